"""The original's checkpoint files (`coarse.pth`, `c2f.pth`): one table, read in both directions.

`pth_table.TABLE` says which key of the file is which of our parameters and how its axes are
arranged. Reading checks that the file has every key of the table and no other.
"""

import ctypes
import dataclasses
import math
import os
import reprlib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from einops import rearrange

from codec_bridge.errors import InputError
from vampnet_jax import lora
from vampnet_jax import pth_table as table
from vampnet_jax.config import ModelConfig
from vampnet_jax.model import to_device

if TYPE_CHECKING:
    import torch

Path = str | os.PathLike


UNSUPPORTED: dict[str, Any] = {
    "ctrl_dims": None,
    "flash_attn": False,
    "r_cond_dim": 0,
    "cond_dim": 0,
}
"""Metadata that would change the network → the one value with which it is ours."""

EXPORTED = {"noise_mode": "mask", "cfg_dropout_prob": 0.2} | UNSUPPORTED
"""Metadata that the original expects and that does not change the network."""

_SIZES = (
    "n_codebooks", "n_conditioning_codebooks", "n_layers", "n_heads", "embedding_dim",
    "vocab_size", "latent_dim",
)  # fmt: skip
_MAX_SIZE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a file of the original holds: numpy arrays in our layout, and the adapters if kept."""

    params: dict
    config: ModelConfig
    adapters: lora.Adapters | None = None
    lora_config: lora.LoraConfig = table.LORA


def from_torch(
    checkpoint_path: Path, codec_path: Path, *, lora_path: Path | None = None
) -> tuple[dict, ModelConfig]:
    """Read a `.pth` of the original VampNet; its LoRA adapters are merged into the weights.

    Args:
      checkpoint_path: `coarse.pth`, `c2f.pth` or a fine-tune of one.
      codec_path: the codec that it was trained with, any file `codec_bridge.load` takes; its
        codebooks become the frozen part of the embedding.
      lora_path: a fine-tune's `lora.pth`, whose adapters replace the checkpoint's own.

    Returns:
      Parameters as `init` returns them, and the configuration.

    Raises:
      InputError: a file is unreadable or unsafe, a key unknown, missing or misshapen, the
        metadata names what this implementation does not have, or the codec does not fit.
    """
    import codec_bridge

    codebooks = np.asarray(codec_bridge.load(codec_path).codebooks)
    checkpoint = read(checkpoint_path, codebooks, lora_path=lora_path)
    return to_device(checkpoint.params), checkpoint.config


def read(
    checkpoint_path: Path,
    codebooks: np.ndarray,
    *,
    lora_path: Path | None = None,
    keep_lora: bool = False,
) -> Checkpoint:
    """As `from_torch`, for given codebooks `[≥C, V, d]`, into numpy arrays.

    With `keep_lora` the adapters are returned beside the parameters instead of merged. Memory
    stays near the size of the file: each tensor is let go as soon as it is converted.
    """
    state, kwargs = _open(checkpoint_path)
    config = _config(kwargs, len(state), checkpoint_path)
    _check(state, table.expected(config, _rank(state)), checkpoint_path)
    deltas = {key: state.pop(key) for key in list(state) if _is_lora(key)}
    if lora_path is not None:
        deltas = _open_lora(lora_path, config)
    lora_config = dataclasses.replace(table.LORA, rank=_rank(deltas) or table.LORA.rank)

    params = _embedding_with(codebooks, config, checkpoint_path)
    for entry in table.TABLE:
        n = config.n_layers if entry.stacked else 1
        out = _aligned_empty((n, *table.shape(entry.our_axes, config)))
        for i in range(n):
            key = entry.torch.format(i=i)
            weight = _pop_weight(state, key, entry.normalised)
            if deltas and not keep_lora and table.target(entry) in table.LORA.targets:
                weight = _merged(weight, deltas, key, lora_config)
            out[i] = rearrange(weight, entry.axes, **table.joint_sizes(entry.axes, config))
            if weight.nbytes > 1 << 20:
                del weight
                _return_free_memory()
        _put(params, entry.ours, out if entry.stacked else out[0])
    if not (deltas and keep_lora):
        return Checkpoint(params, config)
    return Checkpoint(params, config, _stack_adapters(deltas, config, lora_config), lora_config)


def export(
    params: Mapping,
    config: ModelConfig,
    adapters: lora.Adapters | None = None,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """The file that the original would load as this model: hand the result to `torch.save`.

    Args:
      params, config: a model.
      adapters: kept LoRA adapters of the original's form; without, ones that change nothing are
        written, since every model of the original has them.
      seed: of the random half of such adapters.

    Returns:
      `{"state_dict": …, "metadata": …}` with the original's keys, shapes and types; `read` gives
      the same parameters back bit for bit.
    """
    import torch

    from codec_bridge.pth import weight_norm

    if adapters is None:
        adapters = lora.init(jax.random.key(seed), config, table.LORA)
    state: dict[str, torch.Tensor] = {}
    for key, entry, part, i in table.slots(config, table.LORA.rank):
        if part in ("lora_A", "lora_B"):
            pair = adapters[table.target(entry)]
            array = np.asarray(pair[{"lora_A": "a", "lora_B": "b"}[part]][i])
            array = rearrange(array, table.reverse(table.lora_axes(entry, part)))
        else:
            array = np.asarray(_get(params, entry.ours))
            array = rearrange(array[i] if entry.stacked else array, table.reverse(entry.axes))
            if part == "weight_g":
                array = weight_norm(array)
            elif part == "weight_v":
                # A row of zeros has no direction; its length alone makes it zero.
                array = np.where(weight_norm(array) == 0, np.float32(1), array)
        state[key] = torch.from_numpy(np.array(array, np.float32, order="C"))
    sizes = {name: getattr(config, name) for name in _SIZES}
    return {
        "state_dict": state,
        "metadata": {"kwargs": {**sizes, "dropout": config.dropout, **EXPORTED}},
    }


def _open(path: Path) -> tuple[dict[str, "torch.Tensor"], Mapping]:
    """State dict and metadata kwargs of a file."""
    from codec_bridge.pth import read_pth

    checkpoint = read_pth(path)
    kwargs = checkpoint["metadata"].get("kwargs")
    if not isinstance(kwargs, Mapping):
        raise InputError(
            f"{path} is no checkpoint of the original VampNet: its metadata has no 'kwargs'."
        )
    return checkpoint["state_dict"], kwargs


def _open_lora(path: Path, config: ModelConfig) -> dict[str, "torch.Tensor"]:
    """The adapter matrices of a fine-tune's file, which holds nothing else."""
    from codec_bridge.pth import read_pth

    state = read_pth(path)["state_dict"]
    rank = _rank(state)
    if rank is None:
        raise InputError(f"{path} holds no LoRA matrices; give a fine-tune's lora.pth.")
    expected = {key: shape for key, shape in table.expected(config, rank).items() if _is_lora(key)}
    _check(state, expected, path)
    return state


def _config(kwargs: Mapping, n_keys: int, path: Path) -> ModelConfig:
    for name, ours in UNSUPPORTED.items():
        value = kwargs.get(name, ours)
        if type(value) is not type(ours) or value != ours:
            raise InputError(
                f"{path} has {name} {_shown(value)} in its metadata, a model that this "
                f"implementation does not have (only {name} {ours!r})."
            )
    sizes: dict[str, Any] = {}
    for name in _SIZES:
        sizes[name] = kwargs.get(name)
        if type(sizes[name]) is not int or not 0 <= sizes[name] <= _MAX_SIZE:
            raise InputError(
                f"{path} has {name} {_shown(sizes[name])} in its metadata; it must be a whole "
                f"number up to {_MAX_SIZE}."
            )
    if sizes["n_layers"] > n_keys:
        raise InputError(
            f"{path} has n_layers {sizes['n_layers']} in its metadata but only {n_keys} tensors."
        )
    dropout = kwargs.get("dropout", ModelConfig.dropout)
    if not isinstance(dropout, int | float):
        raise InputError(f"{path} has a dropout in its metadata that is no number.")
    try:
        return ModelConfig(**sizes, dropout=float(dropout))
    except InputError as error:
        raise InputError(f"{path} has impossible metadata: {error}") from None


def _check(state: Mapping, expected: Mapping[str, tuple[int, ...]], path: Path) -> None:
    for what, keys in (
        ("unknown", [key for key in state if key not in expected]),
        ("missing", [key for key in expected if key not in state]),
    ):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise InputError(
                f"{path} does not fit a VampNet of the sizes in its metadata: {what} "
                f"{', '.join(map(_shown, keys[:3]))}{more}."
            )
    for key, shape in expected.items():
        if tuple(state[key].shape) != shape:
            raise InputError(
                f"{path} does not fit the sizes in its metadata: {key} is "
                f"{list(state[key].shape)}, not {list(shape)}."
            )
        if not state[key].is_floating_point():
            raise InputError(f"{path} holds {key} as {state[key].dtype}, not as numbers.")


def _pop_weight(state: dict, key: str, normalised: bool) -> np.ndarray:
    from codec_bridge.pth import fold_weight_norm

    if not normalised:
        return _numpy(state.pop(key), key)
    length = _numpy(state.pop(table.sibling(key, "weight_g")), key)
    direction = _numpy(state.pop(table.sibling(key, "weight_v")), key)
    if not direction.any(axis=(1, 2)).all():
        raise InputError(f"The checkpoint's {key}_v has a row of zeros, which has no direction.")
    return fold_weight_norm(direction, length)


def _merged(weight: np.ndarray, adapters: Mapping, key: str, config: lora.LoraConfig) -> np.ndarray:
    a, b = (_numpy(adapters[table.sibling(key, part)], key) for part in ("lora_A", "lora_B"))
    if not b.any():  # untrained: leave the weight as it is, to the bit
        return weight
    return weight + np.float32(config.scale) * (b @ a)


def _stack_adapters(
    state: Mapping, config: ModelConfig, lora_config: lora.LoraConfig
) -> lora.Adapters:
    adapters: lora.Adapters = {}
    for name, pair in lora.shapes(config, lora_config).items():
        adapters[name] = {part: _aligned_empty(shape) for part, shape in pair.items()}
    for key, entry, part, i in table.slots(config, lora_config.rank):
        if part in ("lora_A", "lora_B"):
            axes = table.lora_axes(entry, part)
            array = rearrange(_numpy(state[key], key), axes, **table.joint_sizes(axes, config))
            adapters[table.target(entry)][{"lora_A": "a", "lora_B": "b"}[part]][i] = array
    return adapters


def _embedding_with(codebooks: np.ndarray, config: ModelConfig, path: Path) -> dict:
    n, *rest = codebooks.shape
    if n < config.n_codebooks or tuple(rest) != (config.vocab_size, config.latent_dim):
        raise InputError(
            f"The codec has {n} codebooks of {rest[0]} vectors of width {rest[1]}, but {path} "
            f"needs {config.n_codebooks} of {config.vocab_size} of width {config.latent_dim}; give "
            "the codec that it was trained with."
        )
    return {"embedding": {"codebooks": np.array(codebooks[: config.n_codebooks], np.float32)}}


def _numpy(tensor: "torch.Tensor", key: str) -> np.ndarray:
    array = tensor.detach().float().numpy()
    if not np.isfinite(array).all():
        raise InputError(f"The checkpoint's {key} holds NaN or infinite values; fetch it again.")
    return array


def _shown(value: object) -> str:
    """What a file says, fit for a message."""
    text = value if isinstance(value, str) else reprlib.repr(value)  # which shortens nested ones
    text = " ".join(text[:1000].split())
    return "".join(c if c.isprintable() else "?" for c in text[:80])


def _rank(state: Mapping) -> int | None:
    for key, tensor in state.items():
        if key.endswith(".lora_A") and tensor.ndim == 2 and 0 < len(tensor) <= lora.MAX_RANK:
            return len(tensor)
    return None


def _is_lora(key: str) -> bool:
    return key.endswith((".lora_A", ".lora_B"))


def _aligned_empty(shape: tuple[int, ...]) -> np.ndarray:
    """A float32 array on a 64-byte border, which JAX takes over on CPU without a copy."""
    n_bytes = 4 * math.prod(shape)
    buffer = np.empty(n_bytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + n_bytes].view(np.float32).reshape(shape)


def _return_free_memory() -> None:
    """Give freed memory back to the system.

    The GNU C library keeps freed blocks of less than 32 MB, so that the tensors already converted
    would still count: the peak would be twice the file instead of little more than once.
    """
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):  # not in other C libraries
            library.malloc_trim(0)


def _get(params: Mapping, path: str) -> Any:
    for name in path.split("/"):
        params = params[name]
    return params


def _put(params: dict, path: str, array: np.ndarray) -> None:
    *parents, name = path.split("/")
    for parent in parents:
        params = params.setdefault(parent, {})
    params[name] = array
