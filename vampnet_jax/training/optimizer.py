"""The optimiser, and the learning rate at every step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from vampnet_jax.training.config import TrainConfig

Schedule = Callable[[jax.Array, jax.Array], jax.Array]
"""(step from 0, share of the run that is done) → learning rate."""


def schedule(config: TrainConfig) -> Schedule:
    """The learning rate.

    - `noam`: `rate · D^-0.5 · min(n^-0.5, n · w^-1.5)` for step n = 1, 2, … and warm-up w
      (Vaswani et al. 2017, section 5.3), rate being 2 in VampNet;
    - `cosine`: rises to `rate` in w steps and falls along a cosine to a hundredth of it, which
      it reaches when the share done is 1: by steps, or by time if the run has a time budget;
    - `constant`: rises to `rate` in w steps and stays.
    """
    rate, warmup = config.learning_rate, max(config.warmup_steps, 1)
    width = config.model.embedding_dim

    def learning_rate(step: jax.Array, done: jax.Array) -> jax.Array:
        n = step.astype(jnp.float32) + 1
        if config.schedule == "noam":
            return rate * width**-0.5 * jnp.minimum(n**-0.5, n * warmup**-1.5)
        rise = jnp.minimum(1.0, n / warmup)
        if config.schedule == "constant":
            return rate * rise
        return rate * rise * (0.01 + 0.99 * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(done, 0, 1))))

    return learning_rate


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW without its learning rate: updates point downhill when subtracted.

    Gradients are clipped by their global norm; weight decay is decoupled.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.gradient_clip),
        optax.scale_by_adam(b1=config.adam_b1, b2=config.adam_b2, eps=1e-8),
        optax.add_decayed_weights(config.weight_decay),
    )
