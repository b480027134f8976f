"""What a transformer must compute, by formula, and what the device can compute, measured."""

import itertools
import time

import jax
import jax.numpy as jnp

from vampnet_jax.config import ModelConfig
from vampnet_jax.sampling import SamplingOptions

MAX_ROWS = 16384
"""Rows of the largest product that is measured; bounds memory."""
WORK, ACCELERATOR_WORK = 4e9, 4e12
"""FLOPs of one measurement at least, so that the call itself costs nothing beside them."""


def forward_flops(config: ModelConfig, n_frames: int, n_predicted: int | None = None) -> int:
    """FLOPs of the matrix products of one forward pass over one window.

    Per frame 2 (C·d·D + L·10·D² + D·Cp·V) for the weights and 4·L·T·D for attention. Norms,
    activations and sampling do not count, so a share of the device's rate is a lower bound.

    Args:
      config: the model's dimensions.
      n_frames: T.
      n_predicted: Cp, if logits of fewer codebooks are computed than the model predicts.
    """
    n_predicted = config.n_predicted_codebooks if n_predicted is None else n_predicted
    width = config.embedding_dim
    weights = config.n_codebooks * config.latent_dim * width
    weights += config.n_layers * 10 * width**2
    weights += width * n_predicted * config.vocab_size
    return n_frames * (2 * weights + 4 * config.n_layers * n_frames * width)


def sampling_flops(config: ModelConfig, options: SamplingOptions, n_frames: int) -> int:
    """FLOPs of the matrix products of sampling one window; at most, with entropy_bound.

    A step is a forward pass to the logits of the codebooks that it works on. Guidance takes one
    pass more, without logits, and these logits once more in every step.
    """
    n_predicted = options.codebooks_per_step(config)
    one_pass = forward_flops(config, n_frames, n_predicted)
    without_logits = forward_flops(config, n_frames, 0)
    if options.guidance is None:
        return options.total_steps * one_pass
    return options.total_steps * (2 * one_pass - without_logits) + without_logits


class MatmulRate:
    """The rate of matrix products shaped like the large ones of a model.

    A call multiplies `[rows, D]` by `[D, 4D]` and the result by `[4D, D]`, several times over
    with other weights, and nothing else.

    Args:
      config: gives the width D and the dtype.
      rows: frames times examples of one forward pass.
    """

    def __init__(self, config: ModelConfig, rows: int) -> None:
        width, rows = config.embedding_dim, min(rows, MAX_ROWS)
        dtype, result = config.product_dtype, config.activation_dtype
        self.n_pairs = min(4, config.n_layers)
        """Pairs of weights that take turns."""
        pair_flops = self.n_pairs * 2 * 2 * rows * width * 4 * width
        work = WORK if next(iter(jnp.zeros(()).devices())).platform == "cpu" else ACCELERATOR_WORK
        self.times = max(1, round(work / pair_flops))
        """How often all pairs are gone through."""
        self.flops = self.times * pair_flops

        @jax.jit
        def make() -> tuple[jax.Array, list[tuple[jax.Array, jax.Array]]]:
            def draw(seed: int, n_in: int, n_out: int) -> jax.Array:
                values = jax.random.normal(jax.random.key(seed), (n_in, n_out))
                return (values * n_in**-0.5).astype(dtype)  # keeps the size of what it meets

            pairs = [
                (draw(2 * i, width, 4 * width), draw(2 * i + 1, 4 * width, width))
                for i in range(self.n_pairs)
            ]
            return jnp.ones((rows, width), dtype), pairs

        def multiply(x: jax.Array, pairs: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
            def all_pairs(_: int, x: jax.Array) -> jax.Array:
                for weight in itertools.chain(*pairs):
                    x = jnp.matmul(x, weight, preferred_element_type=result).astype(dtype)
                return x

            return jax.lax.fori_loop(0, self.times, all_pairs, x)

        self._multiply, self._arguments = jax.jit(multiply), make()

    def __call__(self) -> float:
        """Measure once, FLOP/s; the first call compiles."""
        before = time.perf_counter()
        jax.block_until_ready(self._multiply(*self._arguments))
        return self.flops / (time.perf_counter() - before)
