"""The PyTorch network of a codec, built from its configuration and weights."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from codec_bridge.config import CodecConfig
from codec_bridge.errors import InputError
from codec_bridge.receptive_field import Convolution

if TYPE_CHECKING:
    import torch
    from torch.overrides import TorchFunctionMode

KINDS = ("dac", "lac")


def build_network(
    kind: str, config: CodecConfig, tensors: Mapping[str, np.ndarray]
) -> "torch.nn.Module":
    """The PyTorch network of a codec, for inference, sharing memory with `tensors`.

    It has sub-modules `encoder`, `quantizer` and `decoder`.

    Raises:
      InputError: tensors that the configuration needs are missing, unknown or misshapen.
    """
    import torch

    network = _without_weights(kind, config)
    check_names_and_shapes({name: t.shape for name, t in tensors.items()}, _shapes(network))
    state = {name: torch.from_dlpack(np.ascontiguousarray(t)) for name, t in tensors.items()}
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)


def tensor_shapes(kind: str, config: CodecConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a codec, weight normalisation folded."""
    return _shapes(_without_weights(kind, config))


def _without_weights(kind: str, config: CodecConfig) -> "torch.nn.Module":
    import torch

    sizes = dataclasses.asdict(config)
    with torch.device("meta"), _without_values():
        if kind == "dac":
            from codec_bridge.descript import build_dac

            return build_dac(sizes)
        from codec_bridge.lac import LAC

        del sizes["sample_rate"]
        return LAC(**sizes)


def _without_values() -> "TorchFunctionMode":
    """A context in which `torch.nn.init` leaves new parameters as they are.

    On the meta device they hold nothing, but drawing it would import PyTorch's compiler.
    """
    from torch.overrides import TorchFunctionMode

    class WithoutValues(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            kwargs = kwargs or {}
            if getattr(func, "__module__", None) == "torch.nn.init":
                return args[0] if args else kwargs["tensor"]
            return func(*args, **kwargs)

    return WithoutValues()


def _shapes(network: "torch.nn.Module") -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def check_names_and_shapes(
    given: Mapping[str, tuple[int, ...]], needed: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse tensors that do not fit, naming the first few of them."""
    problems = [f"{name} is missing" for name in needed if name not in given]
    problems += [f"{name} is unknown" for name in given if name not in needed]
    problems += [
        f"{name} has shape {list(given[name])} where {list(shape)} is needed"
        for name, shape in needed.items()
        if name in given and tuple(given[name]) != tuple(shape)
    ]
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise InputError(
            f"the codec's weights do not fit its configuration: {', '.join(problems[:5])}{more}"
        )


def convolutions(module: Any) -> list[Convolution]:
    """The chain of convolutions from input to output; of parallel stacks, the widest."""
    import torch

    from codec_bridge.lac import ParallelStacks

    if isinstance(module, torch.nn.Conv1d | torch.nn.ConvTranspose1d):
        (kernel,), (stride,), (dilation,) = module.kernel_size, module.stride, module.dilation
        padding = module.padding[0]
        transposed = isinstance(module, torch.nn.ConvTranspose1d)
        return [Convolution(kernel, stride, dilation, int(padding), transposed)]
    if isinstance(module, ParallelStacks):
        chains = [convolutions(stack) for stack in module.mrf_blocks]
        return max(chains, key=lambda chain: sum(c.reach for c in chain))
    return [c for child in module.children() for c in convolutions(child)]
