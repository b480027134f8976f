"""Drawing a token from filtered logits: one uniform number per token, no sort."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Drawn(NamedTuple):
    """Arrays `[...]`."""

    token: jax.Array
    """int32."""
    log_p: jax.Array
    """Log of the probability that it had."""
    entropy: jax.Array
    """Of softmax(logits), in nats."""


def draw(logits: jax.Array, u: jax.Array, greedy: jax.Array) -> Drawn:
    """Draw from softmax(logits); where greedy, take the likeliest.

    Args:
      logits: float32 `[..., V]`, filtered and divided by the temperature.
      u: float32 `[...]` in [0, 1).
      greedy: bool, broadcast to `[...]`.
    """
    # Not by log_softmax and argmax: a third of the time on CPUs (benchmarks/one_by_one.py).
    highest = jnp.max(logits, axis=-1, keepdims=True)
    log_total = jnp.log(jnp.sum(jnp.exp(logits - highest), axis=-1, keepdims=True))

    def log_p(logits: jax.Array) -> jax.Array:
        return logits - highest - log_total

    p = jnp.exp(log_p(logits))
    token = jnp.where(greedy, _first(logits == highest), inverse_cdf(p, u))
    chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)
    entropy = -jnp.sum(jnp.where(p > 0, p * log_p(logits), 0.0), axis=-1)
    return Drawn(token, log_p(chosen)[..., 0], entropy)


def _first(found: jax.Array) -> jax.Array:
    """Index of the first True along the last axis; on CPUs argmax is slow."""
    index = lax.broadcasted_iota(jnp.int32, found.shape, found.ndim - 1)
    return jnp.min(jnp.where(found, index, found.shape[-1] - 1), axis=-1)


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
