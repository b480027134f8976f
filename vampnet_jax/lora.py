"""Low-rank adapters (LoRA, Hu et al. 2021): a small pytree beside the parameters of a model.

An adapter changes one stacked weight of the blocks: `W + scale · A·B`, with A from the weight's
input to `rank` dimensions and B from there to its output. VampNet is fine-tuned this way, with
rank 8 and scale 1/8 on every projection but the keys' (VampNet, section 4).
"""

import dataclasses
import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np

from codec_bridge.atomic import atomic_write
from codec_bridge.errors import InputError
from vampnet_jax.config import ModelConfig

Adapters = dict
"""`{target: {"a": [L, *input, r], "b": [L, r, *output]}}`, float32."""

INPUT_AXES = {"query": 1, "key": 1, "value": 1, "out": 2, "up": 1, "down": 1}
"""Weight of a block → how many of its axes (after the layers') are input."""
MAX_RANK = 4096


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which weights are adapted and how strongly; hashable, so static under jit."""

    rank: int = 8
    """Width of the bottleneck."""
    alpha: float = 1.0
    """The adapter is scaled by alpha / rank."""
    targets: tuple[str, ...] = ("query", "value", "out", "up", "down")
    """Adapted weights, of query, key, value, out, up and down."""

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= MAX_RANK:
            raise InputError(f"LoRA rank is {self.rank}; it must be from 1 to {MAX_RANK}.")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise InputError(f"LoRA alpha is {self.alpha}; it must be a positive number.")
        unknown = [name for name in self.targets if name not in INPUT_AXES]
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            raise InputError(
                f"LoRA targets are {', '.join(self.targets) or 'none'}; choose some of "
                f"{', '.join(INPUT_AXES)}, each once."
            )

    @property
    def scale(self) -> float:
        """What A·B is multiplied by."""
        return self.alpha / self.rank


def shapes(config: ModelConfig, lora: LoraConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shape of every adapter matrix of a model."""
    n, d, h, k = config.n_layers, config.embedding_dim, config.n_heads, config.head_dim
    weight: dict[str, tuple[int, ...]] = {name: (d, h, k) for name in ("query", "key", "value")}
    weight |= {"out": (h, k, d), "up": (d, 2, 2 * d), "down": (2 * d, d)}
    result = {}
    for name in lora.targets:
        n_in = INPUT_AXES[name]
        inputs, outputs = weight[name][:n_in], weight[name][n_in:]
        result[name] = {"a": (n, *inputs, lora.rank), "b": (n, lora.rank, *outputs)}
    return result


def init(key: jax.Array, config: ModelConfig, lora: LoraConfig) -> Adapters:
    """Draw adapters that change nothing yet: A uniform in ±1/√(inputs), B zero.

    Works under jit, and so with out_shardings.
    """
    adapters: Adapters = {}
    wanted = shapes(config, lora)
    for (name, shape), draw in zip(wanted.items(), jax.random.split(key, len(wanted)), strict=True):
        bound = math.prod(shape["a"][1:-1]) ** -0.5
        adapters[name] = {
            "a": jax.random.uniform(draw, shape["a"], jnp.float32, -bound, bound),
            "b": jnp.zeros(shape["b"], jnp.float32),
        }
    return adapters


def merge(params: dict, adapters: Adapters, lora: LoraConfig) -> dict:
    """Parameters with `scale · A·B` added to the adapted weights; pure, works under jit and grad.

    Args:
      params: as `vampnet_jax.init` returns.
      adapters: of the same model.
      lora: their configuration.

    Returns:
      A new dict of the same layout; what is not adapted is shared with `params`.
    """
    blocks = dict(params["blocks"])
    for name, pair in adapters.items():
        a = pair["a"].reshape(pair["a"].shape[0], -1, lora.rank)  # [L, in, r]
        b = pair["b"].reshape(pair["b"].shape[0], lora.rank, -1)  # [L, r, out]
        delta = jnp.einsum("Lir,Lro->Lio", a, b, precision="highest").reshape(blocks[name].shape)
        blocks[name] = blocks[name] + lora.scale * delta
    return {**params, "blocks": blocks}


def merge_on_host(params: dict, adapters: Adapters, lora: LoraConfig) -> dict:
    """As `merge`, in NumPy, with the same bits on every machine: for weights that are stored.

    (Sums of products come in an order of their own on every device, and accelerators round them.)
    """
    params = jax.tree.map(np.asarray, params)
    blocks = dict(params["blocks"])
    for name, pair in adapters.items():
        weights = np.array(blocks[name], np.float32)
        a = np.asarray(pair["a"], np.float32).reshape(len(weights), -1, lora.rank)
        b = np.asarray(pair["b"], np.float32).reshape(len(weights), lora.rank, -1)
        for layer in range(len(weights)):
            delta = np.zeros((a.shape[1], b.shape[2]), np.float32)
            for rank in range(lora.rank):
                delta += a[layer, :, rank, None] * b[layer, rank]
            weights[layer] += np.float32(lora.scale) * delta.reshape(weights[layer].shape)
        blocks[name] = weights
    return {**params, "blocks": blocks}


def attach(params: dict, adapters: Adapters, lora: LoraConfig) -> dict:
    """Parameters with the adapters beside them, for `vampnet_jax.apply` to add as it goes.

    The same function as with `merge`, but no weight is copied, and its gradient by the adapters
    needs none by the weights: this is how adapters are trained.

    Returns:
      `params` with one more entry, `adapters`: the given ones, `lora.scale` multiplied into B.
    """
    scaled = {name: pair | {"b": lora.scale * pair["b"]} for name, pair in adapters.items()}
    return {**params, "adapters": scaled}


def save(path: str | os.PathLike, adapters: Adapters, lora: LoraConfig) -> None:
    """Write adapters and their configuration as one safetensors file, replacing it atomically."""
    from safetensors.numpy import save_file

    flat = {
        f"{name}/{part}": np.ascontiguousarray(array)
        for name, pair in adapters.items()
        for part, array in pair.items()
    }
    with atomic_write(path) as temporary:
        save_file(flat, temporary, {"lora": json.dumps(dataclasses.asdict(lora))})


def load(path: str | os.PathLike, config: ModelConfig) -> tuple[Adapters, LoraConfig]:
    """Read what `save` wrote, for a model of the given dimensions.

    Raises:
      InputError: the file is damaged, no adapter file, or of a model of another size.
    """
    from safetensors import SafetensorError, safe_open

    adapters: Adapters = {}
    try:
        with safe_open(path, framework="numpy") as file:
            lora = _config_from_json((file.metadata() or {}).get("lora"), path)
            wanted = {
                f"{name}/{part}": shape
                for name, pair in shapes(config, lora).items()
                for part, shape in pair.items()
            }
            found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            if found != wanted:
                wrong = sorted(k for k in found.keys() | wanted if found.get(k) != wanted.get(k))
                raise InputError(
                    f"{path} holds adapters of another model: {wrong[0]} is "
                    f"{found.get(wrong[0], 'missing')}, not {wanted.get(wrong[0], 'expected')}."
                )
            for key in wanted:
                name, part = key.split("/")
                adapters.setdefault(name, {})[part] = file.get_tensor(key)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist.") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is no readable safetensors file ({error}).") from None
    for pair in adapters.values():
        for part, array in pair.items():
            if array.dtype != np.float32:
                raise InputError(f"{path} holds {array.dtype} adapters; they must be float32.")
            pair[part] = jnp.asarray(array)
    return adapters, lora


def _config_from_json(text: str | None, path: str | os.PathLike) -> LoraConfig:
    try:
        fields = json.loads(text or "null")
        return LoraConfig(int(fields["rank"]), float(fields["alpha"]), tuple(fields["targets"]))
    except InputError:
        raise
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{path} is no LoRA adapter file: its metadata lacks 'lora'.") from None
