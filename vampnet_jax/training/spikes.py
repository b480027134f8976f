"""Which gradients are so large that their step is better skipped."""

import jax
import jax.numpy as jnp

JUDGED_FROM = 20
"""Steps whose norms are taken as they come: at first they fall fast."""
MEMORY = 50
"""Steps that the running mean remembers, about."""


def judge(
    norm: jax.Array, usual: jax.Array, step: jax.Array, factor: float
) -> tuple[jax.Array, jax.Array]:
    """Compare a gradient's norm with what is usual.

    Args:
      norm: of this step's gradient.
      usual: running mean of the norms before.
      step: int32, steps before.
      factor: the norm may be so many times what is usual.

    Returns:
      Whether to take the step, and the new running mean. A spike counts in it as much as is still
      allowed, so that norms that stay larger are usual after a while.
    """
    limit = jnp.where(step < JUDGED_FROM, jnp.inf, factor * usual)
    seen = jnp.where(jnp.isfinite(norm), jnp.minimum(norm, limit), usual)
    weight = jnp.maximum(1 / (step.astype(jnp.float32) + 1), 1 / MEMORY)
    return jnp.isfinite(norm) & (norm <= limit), usual + weight * (seen - usual)
