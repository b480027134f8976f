"""Prompts as masks: bool `[..., C, T]` arrays in which True means "generate this token".

Every function is pure and works under jit and vmap; shapes are `(..., C, T)` and times are
frames. Masks combine with `&` (a token is generated only if all say so) and `|`. Masks found
in audio (onsets, beats) are in `vampnet_jax.rhythm`. Source: VampNet, section 3.2.
"""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp

Shape = Sequence[int]


def full(shape: Shape) -> jax.Array:
    """Generate everything: keep no token."""
    return jnp.ones(shape, bool)


def periodic(
    shape: Shape, period: int | jax.Array, width: int | jax.Array = 1, offset: int | jax.Array = 0
) -> jax.Array:
    """Keep every `period`-th frame, widened to `width`.

    Frames j with j mod period = 0 are kept, each with ⌊width/2⌋ neighbours on both sides (so an
    even width keeps one frame more), then everything is rolled circularly by `offset` frames
    towards later times.

    Args:
      shape: `(..., C, T)`.
      period: 0 keeps nothing, 1 everything.
      width: frames kept around each.
      offset: frames to roll by.
    """
    n_frames = shape[-1]
    frame = (jnp.arange(n_frames) - offset) % n_frames
    divisor = jnp.maximum(period, 1)
    reach = jnp.asarray(width) // 2
    before = frame % divisor  # distance to the last multiple of the period
    after = divisor - before  # and to the next, which must be a frame that exists
    near = (before <= reach) | ((after <= reach) & (frame + after < n_frames))
    return _over_codebooks(~(near & (jnp.asarray(period) > 0)), shape)


def inpaint(shape: Shape, prefix: int | jax.Array, suffix: int | jax.Array) -> jax.Array:
    """Keep the first `prefix` and the last `suffix` frames; fill what lies between."""
    frame = jnp.arange(shape[-1])
    return _over_codebooks((frame >= prefix) & (frame < shape[-1] - jnp.asarray(suffix)), shape)


def regions(shape: Shape, spans: Iterable[tuple[int, int]]) -> jax.Array:
    """Keep everything outside the spans, each half-open `[start, stop)` in frames."""
    return _over_codebooks(_inside(shape[-1], spans), shape)


def keep_regions(shape: Shape, spans: Iterable[tuple[int, int]]) -> jax.Array:
    """Keep only what lies inside the spans, each half-open `[start, stop)` in frames."""
    return _over_codebooks(~_inside(shape[-1], spans), shape)


def random(key: jax.Array, shape: Shape, intensity: float | jax.Array) -> jax.Array:
    """Keep each token independently with probability 1 − intensity."""
    return jax.random.uniform(key, shape) < intensity


def dropout(key: jax.Array, mask: jax.Array, p: float | jax.Array) -> jax.Array:
    """Generate a random share `p` of the frames as well, in all codebooks of an example."""
    dropped = jax.random.uniform(key, (*mask.shape[:-2], 1, mask.shape[-1])) < p
    return mask | dropped


def keep_codebooks(mask: jax.Array, n: int | jax.Array) -> jax.Array:
    """Keep all of the first `n` codebooks, whatever the mask says."""
    return mask & (_codebook_index(mask) >= n)


def upper_codebooks(mask: jax.Array, first: int | jax.Array) -> jax.Array:
    """Generate all of the codebooks from `first` on, whatever the mask says."""
    return mask | (_codebook_index(mask) >= first)


def stretch(tokens: jax.Array, mask: jax.Array, factor: int) -> tuple[jax.Array, jax.Array]:
    """Slow down: repeat every frame `factor` times and generate all but each first copy.

    Args:
      tokens, mask: `[..., C, T]`.
      factor: how many times longer.

    Returns:
      Tokens and mask `[..., C, T·factor]`; a frame that the mask generates stays so in every copy.
    """
    first_copy = jnp.arange(tokens.shape[-1] * factor) % factor == 0
    longer = jnp.repeat(mask, factor, axis=-1)
    return jnp.repeat(tokens, factor, axis=-1), longer | _over_codebooks(~first_copy, longer.shape)


def _inside(n_frames: int, spans: Iterable[tuple[int, int]]) -> jax.Array:
    starts_and_stops = jnp.asarray([tuple(span) for span in spans], jnp.int32).reshape(-1, 2)
    frame = jnp.arange(n_frames)[:, None]
    starts, stops = starts_and_stops[None, :, 0], starts_and_stops[None, :, 1]
    return jnp.any((frame >= starts) & (frame < stops), axis=-1)


def _over_codebooks(frames: jax.Array, shape: Shape) -> jax.Array:
    """Spread a mask of frames `[T]` over `(..., C, T)`."""
    return jnp.broadcast_to(jnp.expand_dims(frames, range(len(shape) - 1)), tuple(shape))


def _codebook_index(mask: jax.Array) -> jax.Array:
    return jnp.expand_dims(jnp.arange(mask.shape[-2]), (*range(mask.ndim - 2), -1))
