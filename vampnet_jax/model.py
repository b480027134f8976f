"""`init` and `apply`: the model as pure functions over a plain dict of parameters.

Both work under jit, grad, vmap and sharding; the layout of the dict is in docs/architecture.md.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from vampnet_jax.config import ModelConfig
from vampnet_jax.transformer import Placement, VampNet, bias_of_frames, dropout_seeds

Params = dict
"""Nested dict of float32 arrays."""


def init(key: jax.Array, config: ModelConfig, codebooks: jax.Array) -> Params:
    """Draw the parameters of an untrained model.

    Args:
      key: a JAX random key.
      config: the model's dimensions.
      codebooks: float32 `[≥C, V, d]`, the codec's own vectors; the first C are used and never
        trained.

    Returns:
      A nested dict of float32 arrays.

    Raises:
      ValueError: codebooks do not fit the configuration.
    """
    wanted = (config.n_codebooks, config.vocab_size, config.latent_dim)
    if codebooks.shape[0] < wanted[0] or codebooks.shape[1:] != wanted[1:]:
        raise ValueError(f"codebooks are {codebooks.shape}; the model needs {wanted} or more rows")
    used = jnp.asarray(codebooks[: config.n_codebooks], jnp.float32)
    return nnx.to_pure_dict(nnx.state(VampNet(config, used, nnx.Rngs(params=key))))


def to_device(params: Params) -> Params:
    """Hand NumPy arrays over to JAX, letting go of each; they must not be written to any more.

    On CPU, JAX takes over the memory of aligned arrays, where `jnp.asarray` would copy it.
    """
    for key, value in params.items():
        params[key] = to_device(value) if isinstance(value, dict) else jax.device_put(value)
    return params


@functools.partial(jax.jit, static_argnames="config")  # a scan outside jit compiles at every call
def apply(
    params: Params,
    tokens: jax.Array,
    config: ModelConfig,
    *,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Logits of every predicted token (VampNet, section 3).

    Args:
      params: as `init` returns, perhaps with LoRA adapters that `vampnet_jax.lora.attach` added.
      tokens: int32 `[B, C, T]`, ids 0 … V−1, or V for MASK.
      config: the model's dimensions.
      dropout_key: switches dropout on (training): one key (example b uses fold_in(key, b)) or B
        keys.

    Returns:
      float32 `[B, Cp, T, V]`.
    """
    logits = frame_major_logits(params, tokens, config, dropout_key=dropout_key)
    return jnp.swapaxes(logits, 1, 2)


def frame_major_logits(
    params: Params,
    tokens: jax.Array,
    config: ModelConfig,
    *,
    bias: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """As `apply`, in the order the model computes them: float32 `[B, T, Cp, V]`.

    `bias` is what `position_bias` returns, for callers that use it more than once.
    """
    x = frame_features(params, tokens, config, bias=bias, dropout_key=dropout_key)
    return frame_logits(params, x, config)


def frame_features(
    params: Params,
    tokens: jax.Array,
    config: ModelConfig,
    *,
    bias: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
    place: Placement = lambda x: x,
) -> jax.Array:
    """What the head sees: `[B, T, D]`, the first half of `frame_major_logits`.

    Args:
      params, tokens, config, bias: as there; or bias as `position_bias_by_part` returns.
      dropout_key: one key (example b uses fold_in(key, b)) or B keys; an example's dropout does
        not depend on the batch around it.
      place: says where activations lie on the devices; gets arrays `[B, …]`.
    """
    adapters = params.get("adapters", {})
    seeds = None
    if dropout_key is not None:
        seeds = dropout_seeds(dropout_key, tokens.shape[0], config)
    return _module(params, config)(tokens, config, bias, seeds, adapters, place)


def frame_logits(
    params: Params, x: jax.Array, config: ModelConfig, codebook: jax.Array | int | None = None
) -> jax.Array:
    """The head alone: `frame_features` of any frames `[B, T, D]` → float32 `[B, T, Cp, V]`.

    Of the predicted codebooks only one if it is given, `[B, T, 1, V]`.
    """
    return _module(params, config).head(x, config, codebook)


def position_bias(params: Params, n_frames: int, config: ModelConfig) -> jax.Array:
    """Relative-position bias added to attention scores, `[H, query, key]`."""
    return _module(params, config).bias_of_frames(n_frames)


def position_bias_by_part(params: Params, n_frames: int, parts: int, place: Placement) -> jax.Array:
    """`position_bias` once for each of so many equal parts of a batch, `[parts, H, query, key]`.

    The values are the same. But each device then adds up the gradient of its own copy, and what
    is summed over devices is the small table, once, instead of every block's `[H, T, T]`.
    """
    table = params["position_bias"]
    tables = place(jnp.broadcast_to(table[None], (parts, *table.shape)))
    return jax.vmap(functools.partial(bias_of_frames, n_frames=n_frames))(tables)


def latents(params: Params, tokens: jax.Array, config: ModelConfig) -> jax.Array:
    """Codec vectors of tokens `[B, C, T]` before the projection, `[B, C, T, d]`."""
    return _module(params, config).embedding.latents(tokens)


def _module(params: Params, config: ModelConfig) -> VampNet:
    weights = {name: value for name, value in params.items() if name != "adapters"}
    return nnx.merge(_graphdef(config), weights)


@functools.lru_cache(maxsize=64)
def _graphdef(config: ModelConfig) -> nnx.GraphDef:
    """The structure of the network, made once per configuration without allocating arrays."""
    shape = (config.n_codebooks, config.vocab_size, config.latent_dim)
    codebooks = jax.ShapeDtypeStruct(shape, jnp.float32)
    return nnx.graphdef(nnx.eval_shape(lambda c: VampNet(config, c, nnx.Rngs(params=0)), codebooks))
