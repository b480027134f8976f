"""Typical, top-k and top-p filtering of logits, without sorting the vocabulary.

A filter keeps the tokens whose score is at most a threshold, and the threshold is the smallest
one at which enough tokens, or enough probability, is kept. Instead of sorting, which is slow on
CPUs and TPUs, the threshold is found by bisection over the 32 bits of a float, so it is exact.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


def filter_logits(
    logits: jax.Array,
    *,
    typical_mass: jax.Array | float | None = None,
    typical_min_tokens: jax.Array | int = 1,
    top_k: jax.Array | int | None = None,
    top_p: jax.Array | float | None = None,
) -> jax.Array:
    """Set the logits of dropped tokens to −inf; filters apply in the order of the arguments.

    Args:
      logits: float32 `[..., V]`, not yet divided by a temperature.
      typical_mass, typical_min_tokens: see `typical_keep`; None switches the filter off.
      top_k: see `top_k_keep`; None switches the filter off.
      top_p: see `top_p_keep`; None switches the filter off.
    """
    if typical_mass is not None:
        keep = typical_keep(logits, typical_mass, typical_min_tokens)
        logits = jnp.where(keep, logits, -jnp.inf)
    if top_k is not None:
        logits = jnp.where(top_k_keep(logits, top_k), logits, -jnp.inf)
    if top_p is not None:
        logits = jnp.where(top_p_keep(logits, top_p), logits, -jnp.inf)
    return logits


def typical_keep(
    logits: jax.Array, mass: jax.Array | float, min_tokens: jax.Array | int = 1
) -> jax.Array:
    """Which tokens locally typical sampling keeps (Meister et al. 2023).

    Tokens are taken by how near their surprisal is to the entropy, nearest first, until they
    hold `mass` of the probability (the one that crosses it included) and are at least
    `min_tokens`. A mass of 1 or more keeps all. Tokens at equal distance are treated alike.

    Args:
      logits: float32 `[..., V]`.

    Returns:
      bool `[..., V]`.
    """
    log_p = jax.nn.log_softmax(logits, axis=-1)
    p = jnp.exp(log_p)
    entropy = -jnp.sum(jnp.where(p > 0, p * log_p, 0.0), axis=-1, keepdims=True)
    distance = jnp.where(p > 0, jnp.abs(-log_p - entropy), jnp.inf)

    least = jnp.asarray(jnp.minimum(min_tokens, logits.shape[-1]), jnp.float32)

    def enough(within: jax.Array) -> jax.Array:
        held = jnp.sum(jnp.where(within, p, 0.0), axis=-1, keepdims=True)
        return (held >= mass) & (count(within) >= least)

    return smallest_prefix(distance, enough) | (jnp.asarray(mass) >= 1)


def top_k_keep(logits: jax.Array, k: jax.Array | int) -> jax.Array:
    """The k most probable tokens and all that tie with the k-th; bool `[..., V]`."""
    wanted = jnp.asarray(jnp.clip(k, 1, logits.shape[-1]), jnp.float32)
    return smallest_prefix(-logits, lambda kept: count(kept) >= wanted)


def top_p_keep(logits: jax.Array, p: jax.Array | float) -> jax.Array:
    """Tokens before which, from the most probable down, at most p of the probability lies.

    So the token that crosses p is kept, and ties are treated alike (Holtzman et al. 2020).
    """
    probabilities = jax.nn.softmax(logits, axis=-1)

    def crossed(kept: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(kept, probabilities, 0.0), axis=-1, keepdims=True) > p

    return smallest_prefix(-logits, crossed)


def smallest_prefix(scores: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Tokens from the lowest score up, as few as are enough; all if all are not enough.

    Args:
      scores: float32 `[..., V]`.
      enough: from a bool `[..., V]` of kept tokens to a bool `[..., 1]`; monotone.

    Returns:
      bool `[..., V]`.
    """
    keys = _ordered_integers(scores)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # the threshold lies in (low, high]
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, without overflow
        found = enough(keys <= middle)
        return jnp.where(found, low, middle + 1), jnp.where(found, middle, high)

    edge, limits = jnp.zeros_like(keys[..., :1]), jnp.iinfo(jnp.int32)
    _, threshold = lax.fori_loop(0, 32, halve, (edge + limits.min, edge + limits.max))
    return keys <= threshold


def _ordered_integers(x: jax.Array) -> jax.Array:
    """int32 that are in the same order as the floats (−0 and 0 alike)."""
    bits = lax.bitcast_convert_type(x + 0.0, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.iinfo(jnp.int32).max, bits)


def count(kept: jax.Array) -> jax.Array:
    """How many are True along the last axis, in float32, which CPUs add faster; `[..., 1]`."""
    return jnp.sum(kept.astype(jnp.float32), axis=-1, keepdims=True)
