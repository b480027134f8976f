"""Iterative decoding: masked tokens are filled in a few at a time (VampNet, section 3.3).

One step draws a token for every masked position, keeps those the model is surest of, and masks
the rest again; how many stay masked falls along a cosine (MaskGIT: Chang et al. 2022). All steps
are one `lax.scan` in one compiled program per (shape, steps, filters in use); the values of the
options are traced, so changing them never recompiles.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from codec_bridge.errors import InputError
from vampnet_jax import model
from vampnet_jax.config import ModelConfig
from vampnet_jax.filters import filter_logits


@functools.partial(
    jax.tree_util.register_dataclass,
    meta_fields=["steps"],
    data_fields=[
        "temperature",
        "mask_temperature",
        "sample_cutoff",
        "top_k",
        "top_p",
        "typical_mass",
        "typical_min_tokens",
    ],
)
@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How to decode. The defaults are the original's for its coarse model."""

    steps: int = 36
    """S, decoding steps: more is slower and, up to a point, better."""
    temperature: float = 1.0
    """Divides the logits: below 1 safer, above 1 wilder."""
    mask_temperature: float = 10.5
    """Randomness in the order in which positions are fixed; 0 fixes the surest first."""
    sample_cutoff: float = 1.0
    """Share of the steps that draw tokens at random; after it the likeliest is taken."""
    top_k: int | None = None
    """Draw from the k likeliest tokens only; None switches the filter off."""
    top_p: float | None = None
    """Draw from the likeliest tokens that hold this probability; None switches it off."""
    typical_mass: float | None = 0.15
    """Draw from the tokens of typical surprisal that hold this probability; None: off."""
    typical_min_tokens: int = 64
    """Typical filtering keeps at least this many tokens."""

    def __post_init__(self) -> None:
        # Under jit the fields are tracers, which have no values to check.
        for name in ("steps", "top_k", "typical_min_tokens"):
            value = getattr(self, name)
            if isinstance(value, int | float) and not (isinstance(value, int) and value >= 1):
                raise InputError(f"{name} is {value}; it must be a whole number of at least 1.")
        for name in ("mask_temperature", "sample_cutoff", "top_p", "typical_mass"):
            value = getattr(self, name)
            if isinstance(value, int | float) and not 0 <= value < np.inf:
                raise InputError(f"{name} is {value}; it must be a number of at least 0.")
        if isinstance(self.temperature, int | float) and not 0 < self.temperature < np.inf:
            raise InputError(
                f"temperature is {self.temperature}; it must be above 0 (for the likeliest token "
                "at every step set sample_cutoff to 0)."
            )


COARSE_DEFAULTS = SamplingOptions()
FINE_DEFAULTS = SamplingOptions(steps=2)


def schedule(steps: int) -> np.ndarray:
    """γ after each of S steps, the share of tokens still masked; float32 `[S]`.

    The argument of the cosine is rounded to float32 as in the original (cos(π/3) is 0.49999997),
    since other roundings give other counts.
    """
    r = np.arange(1, steps + 1, dtype=np.float32) / np.float32(steps)
    angle = r * np.float32(np.pi / 2)
    gamma = np.cos(angle.astype(np.float64)).astype(np.float32)
    return np.maximum(gamma, np.float32(1e-10))


def generate(
    params: model.Params,
    tokens: jax.Array,
    mask: jax.Array,
    key: jax.Array,
    config: ModelConfig,
    options: SamplingOptions,
    *,
    n_frames: jax.Array | int | None = None,
) -> jax.Array:
    """Fill in the masked tokens of the predicted codebooks.

    Each example is decoded on its own: its result depends on its tokens, mask and key, not on
    the batch it is in.

    Args:
      params: as `vampnet_jax.init` returns.
      tokens: int32 `[B, C, T]`; what stands at masked positions does not matter.
      mask: bool `[B, C, T]`, True = generate. Ignored on conditioning codebooks.
      key: one random key, of which example b uses `fold_in(key, b)`, or B keys.
      config: the model's dimensions.
      options: how to decode.
      n_frames: how many of the T frames are music; the rest is padding, which changes nothing: the
        result is that of the first `n_frames` alone. So clips of several lengths can share one
        compiled program. None means all.

    Returns:
      int32 `[B, C, T]`; kept tokens are those of the input.

    Raises:
      ValueError: shapes do not fit each other or the configuration.
    """
    if tokens.ndim != 3 or tokens.shape[1] != config.n_codebooks:
        raise ValueError(f"tokens are {tokens.shape}; the model needs [B, {config.n_codebooks}, T]")
    if mask.shape != tokens.shape:
        raise ValueError(f"mask is {mask.shape} and tokens are {tokens.shape}; they must be alike")
    keys = example_keys(key, tokens.shape[0])
    n_frames = jnp.asarray(tokens.shape[2] if n_frames is None else n_frames, jnp.int32)
    return _generate(params, tokens, mask, keys, n_frames, config, _traced(options))


def example_keys(key: jax.Array, n_examples: int) -> jax.Array:
    """One typed key per example, from one key or from as many keys; legacy keys are taken too."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(n_examples))
    if key.shape != (n_examples,):
        raise ValueError(f"there are {key.shape} keys for {n_examples} examples")
    return key


def _traced(options: SamplingOptions) -> SamplingOptions:
    """The options as arrays of fixed types, so that 1 and 1.0 share a program."""
    integers = ("top_k", "typical_min_tokens")
    values: dict[str, Any] = {
        field.name: jnp.asarray(value, jnp.int32 if field.name in integers else jnp.float32)
        for field in dataclasses.fields(options)
        if field.name != "steps" and (value := getattr(options, field.name)) is not None
    }
    return dataclasses.replace(options, **values)


@functools.partial(jax.jit, static_argnames="config")
def _generate(
    params: model.Params,
    tokens: jax.Array,
    mask: jax.Array,
    keys: jax.Array,
    n_frames: jax.Array,
    config: ModelConfig,
    options: SamplingOptions,
) -> jax.Array:
    is_music = jnp.arange(tokens.shape[-1]) < n_frames
    mask = mask.astype(bool) & is_music[None, None]
    given = tokens[:, : config.n_conditioning_codebooks].astype(jnp.int32)
    prompt = jnp.swapaxes(tokens[:, config.n_conditioning_codebooks :], 1, 2).astype(jnp.int32)
    masked = jnp.swapaxes(mask[:, config.n_conditioning_codebooks :], 1, 2)
    n_masked = jnp.sum(masked, axis=(1, 2), dtype=jnp.int32)  # N₀ of each example
    bias = model.position_bias(params, tokens.shape[-1], config)
    bias = jnp.where(is_music[None, None], bias, -jnp.inf)  # no frame attends to padding

    def step(carry: tuple, xs: tuple) -> tuple[tuple, None]:
        filled, masked = carry  # [B, T, Cp]
        i, gamma, progress = xs
        current = jnp.where(masked, config.mask_token, filled)
        current = jnp.concatenate([given, jnp.swapaxes(current, 1, 2)], axis=1)
        logits = model.frame_major_logits(params, current, config, bias=bias)
        step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, i)
        drawn, log_p = _draw(step_keys, logits, i / options.steps, options)
        filled = jnp.where(masked, drawn, filled)

        noise = _per_example(jax.random.gumbel, step_keys, 1, masked.shape[1:])
        confidence = log_p + options.mask_temperature * (1 - progress) * noise
        still = jnp.sum(masked, axis=(1, 2), dtype=jnp.int32)
        wanted = jnp.floor(gamma * n_masked.astype(jnp.float32)).astype(jnp.int32)
        count = jnp.maximum(1, jnp.minimum(wanted, still - 1))
        count = jnp.where(i == options.steps - 1, 0, count)
        return (filled, _least_confident(confidence, masked, count)), None

    index = np.arange(options.steps, dtype=np.int32)
    progress = ((index + 1) / options.steps).astype(np.float32)
    xs = (index, schedule(options.steps), progress)
    (filled, _), _ = lax.scan(step, (prompt, masked), xs)
    return jnp.concatenate([given, jnp.swapaxes(filled, 1, 2)], axis=1)


def _draw(
    keys: jax.Array, logits: jax.Array, elapsed: jax.Array, options: SamplingOptions
) -> tuple[jax.Array, jax.Array]:
    """A token for every position and the log of its probability, both `[B, T, Cp]`."""
    logits = filter_logits(
        logits,
        typical_mass=options.typical_mass,
        typical_min_tokens=options.typical_min_tokens,
        top_k=options.top_k,
        top_p=options.top_p,
    )
    log_p = jax.nn.log_softmax(logits / options.temperature, axis=-1)
    u = _per_example(jax.random.uniform, keys, 0, logits.shape[1:-1])
    greedy = elapsed >= options.sample_cutoff
    token = jnp.where(greedy, jnp.argmax(log_p, axis=-1), inverse_cdf(jnp.exp(log_p), u))
    token = token.astype(jnp.int32)
    return token, jnp.take_along_axis(log_p, token[..., None], axis=-1)[..., 0]


def inverse_cdf(probabilities: jax.Array, u: jax.Array) -> jax.Array:
    """The first token whose cumulative probability exceeds u; never one of probability 0.

    Goes through sums of 32 tokens first, which avoids a cumulative sum over the vocabulary.

    Args:
      probabilities: float32 `[..., V]`, need not sum to exactly 1.
      u: float32 `[...]` in [0, 1).

    Returns:
      int32 `[...]`.
    """
    size = 32
    padding = [(0, 0)] * (probabilities.ndim - 1) + [(0, -probabilities.shape[-1] % size)]
    blocks = jnp.pad(probabilities, padding)
    blocks = blocks.reshape(*probabilities.shape[:-1], -1, size)
    upto = jnp.cumsum(jnp.sum(blocks, axis=-1), axis=-1)
    target = u[..., None] * upto[..., -1:]
    block = jnp.sum(upto <= target, axis=-1, keepdims=True)
    before = jnp.where(block > 0, jnp.take_along_axis(upto, jnp.maximum(block - 1, 0), -1), 0.0)
    within = jnp.cumsum(jnp.take_along_axis(blocks, block[..., None], axis=-2)[..., 0, :], axis=-1)
    # Rounding may put the rest of the target at or above the block's own sum.
    rest = jnp.minimum(target - before, within[..., -1:] * (1 - jnp.finfo(jnp.float32).eps))
    token = block[..., 0] * size + jnp.sum(within <= rest, axis=-1)
    return token.astype(jnp.int32)


def _least_confident(confidence: jax.Array, masked: jax.Array, count: jax.Array) -> jax.Array:
    """Of the masked positions `[B, T, Cp]` the `count` `[B]` least confident, exactly."""
    flat = jnp.where(masked, confidence, jnp.inf).reshape(len(count), -1)
    order = jnp.argsort(flat, axis=-1, stable=True)  # ties go frame by frame
    rank = jnp.argsort(order, axis=-1)
    return (rank < count[:, None]).reshape(masked.shape) & masked


def _per_example(draw, keys: jax.Array, stream: int, shape: tuple[int, ...]) -> jax.Array:
    """Random numbers `[B, *shape]` of which each example's depend on its own key only."""
    return jax.vmap(lambda key: draw(jax.random.fold_in(key, stream), shape))(keys)
