"""Which masked tokens a decoding step settles, and how many; the rest stay masked for the next."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vampnet_jax import filters

Values = Any
"""A NumPy array `[S]`; inside the scan over steps, one step's element as a traced scalar."""


class Plan(NamedTuple):
    """What is known of every step beforehand."""

    number: Values
    """0 … S−1; every step folds its own into the key."""
    gamma: Values
    """γ, the share of the tokens still masked after the step."""
    elapsed: Values
    """The share of the steps done before it, float32."""
    progress: Values
    """The share of the steps done after it, float32."""
    codebook: Values
    """The predicted codebook that it fills; 0 where a step may fill all of them."""


def schedule(steps: int) -> np.ndarray:
    """γ after each of S steps; float32 `[S]` (MaskGIT's cosine: Chang et al. 2022).

    The argument of the cosine is rounded to float32 as in the original (cos(π/3) is 0.49999997),
    since other roundings give other counts.
    """
    r = np.arange(1, steps + 1, dtype=np.float32) / np.float32(steps)
    angle = r * np.float32(np.pi / 2)
    gamma = np.cos(angle.astype(np.float64)).astype(np.float32)
    return np.maximum(gamma, np.float32(1e-10))


def plan(steps: int, codebook_steps: tuple[int, ...] | None = None) -> Plan:
    """All codebooks in S steps together; or one after the other, each in steps of its own."""
    runs = [(0, steps)] if codebook_steps is None else list(enumerate(codebook_steps))
    gamma = [schedule(n) for _, n in runs]
    for run in gamma:
        run[-1] = 0.0  # the last step settles all
    index = [np.arange(n, dtype=np.float32) for _, n in runs]
    return Plan(
        number=np.arange(sum(n for _, n in runs), dtype=np.int32),
        gamma=np.concatenate(gamma),
        elapsed=np.concatenate([i / np.float32(len(i)) for i in index]),
        progress=np.concatenate([(i + 1) / np.float32(len(i)) for i in index]),
        codebook=np.concatenate([np.full(n, c, np.int32) for c, n in runs]),
    )


def n_still_masked(gamma: jax.Array, at_first: jax.Array, still: jax.Array) -> jax.Array:
    """How many stay masked after a step: ⌊γ·N₀⌋, fewer than before, and one or more if γ > 0."""
    wanted = jnp.floor(gamma * at_first.astype(jnp.float32)).astype(jnp.int32)
    return jnp.where(gamma > 0, jnp.maximum(1, jnp.minimum(wanted, still - 1)), 0)


def most_masked(gamma: np.ndarray, n: int) -> np.ndarray:
    """No more than so many of n are masked before each step of one run; int `[S]`."""
    after = np.maximum(1, np.floor(gamma * np.float32(n)).astype(int))
    return np.concatenate([[n], after[:-1]])


def most_settled(schedule: Plan, n: int) -> int:
    """No step settles more of n tokens."""
    before = np.where(schedule.elapsed == 0, 1.0, np.roll(schedule.gamma, 1))
    return min(n, int(np.max((before - schedule.gamma) * n)) + 2)


def least_confident(confidence: jax.Array, masked: jax.Array, count: jax.Array) -> jax.Array:
    """Of the masked positions `[B, T, C]` the `count` `[B]` least confident, exactly."""
    flat = jnp.where(masked, confidence, jnp.inf).reshape(len(count), -1)
    wanted = count[:, None].astype(jnp.float32)
    # Ties go frame by frame. By bisection: several times as fast as sorting, on CPUs.
    first = filters.smallest_prefix(flat, lambda within: filters.count(within) >= wanted)
    last = jnp.max(jnp.where(first, flat, -jnp.inf), axis=-1, keepdims=True)
    below, ties = flat < last, flat == last
    room = wanted - filters.count(below)
    position = jnp.cumsum(ties, axis=-1, dtype=jnp.float32)
    chosen = below | (ties & (position <= room))
    return chosen.reshape(masked.shape) & masked


def spread_ranks(offsets: jax.Array, masked: jax.Array, by_codebook: bool) -> jax.Array:
    """An order of the masked positions in which any first few are spread evenly over time.

    Frame t has the priority (t·φ + offset) mod 1, φ the golden ratio: a low-discrepancy sequence
    (Weyl; in images, orders like it beat confidence: Besnier et al. 2025, "Halton scheduler").

    Args:
      offsets: uint32 `[B, C]` at random, one for each codebook.
      masked: bool `[B, T, C]`.
      by_codebook: order each codebook on its own.

    Returns:
      int32 `[B, T, C]`, 0 for what comes first; positions that are not masked come last.
    """
    frame = jnp.arange(masked.shape[1], dtype=jnp.uint32)
    golden = np.uint32(0x9E3779B9)  # φ − 1, as a fraction of 2³²
    priority = ((frame * golden)[None, :, None] + offsets[:, None]) >> 1
    priority = jnp.where(masked, priority, np.uint32(0xFFFFFFFF))
    if not by_codebook:
        priority = priority.reshape(len(priority), -1)
    rank = jnp.argsort(jnp.argsort(priority, axis=1, stable=True), axis=1)
    return rank.reshape(masked.shape).astype(jnp.int32)


def n_within_entropy(
    confidence: jax.Array, entropy: jax.Array, masked: jax.Array, bound: jax.Array | float
) -> jax.Array:
    """How many of the first in order can be settled at once: as many as have little left to tell.

    The largest k for which the entropies of the k most confident positions, the largest of them
    left out, sum to at most the bound; at least 1. That sum bounds what is lost by drawing the k
    as if they did not depend on each other (Ben-Hamu et al. 2025, "EB-Sampler").

    Args:
      confidence, entropy: float32 `[B, T, C]`; entropy in nats.
      masked: bool `[B, T, C]`.
      bound: nats.

    Returns:
      int32 `[B]`.
    """
    flat = jnp.where(masked, -confidence, jnp.inf).reshape(len(masked), -1)
    order = jnp.argsort(flat, axis=-1, stable=True)
    entropy = jnp.where(masked, entropy, 0.0).reshape(len(masked), -1)
    ordered = jnp.take_along_axis(entropy, order, axis=-1)
    lost = jnp.cumsum(ordered, axis=-1) - jax.lax.cummax(ordered, axis=1)
    within = jnp.take_along_axis(masked.reshape(len(masked), -1), order, axis=-1) & (lost <= bound)
    return jnp.maximum(1, jnp.sum(within, axis=-1, dtype=jnp.int32))
