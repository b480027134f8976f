"""What the model expects of tokens that are not decoded yet, as integers.

Both ends must get the same integers from the same tokens. They therefore run one program, on the
CPU whatever else there is, in float32, on one window at a time. Other versions or processors may
round differently, which `Predictor.fingerprint` finds out before anything is decoded wrongly.
"""

import dataclasses
import functools
import hashlib
import math

import jax
import jax.numpy as jnp
import numpy as np

from vampnet_jax import model as network
from vampnet_jax.config import ModelConfig
from vampnet_jax.release import Model, Stage

SCALE = 2**22
UNIFORM_SHARE = 1 / 64
"""Every token keeps this share of the uniform distribution: nothing is ruled out, and a symbol
costs 0.02 bits at least, which bounds what a short file can claim to hold."""
LEAST_BITS = -math.log2(1 - UNIFORM_SHARE / 2)
"""No symbol costs less: of two codes or more, the others have half of that share at least."""


class Predictor:
    """The two stages of a model as sources of frequencies for the coder."""

    def __init__(self, model: Model) -> None:
        self._cpu = jax.devices("cpu")[0]
        self.coarse, self.fine = (self._on_cpu(stage) for stage in (model.coarse, model.fine))
        self.coarse_window, self.fine_window = model.coarse_window, model.fine_window

    def frequencies(self, stage: Stage, tokens: np.ndarray) -> np.ndarray:
        """Frequencies of every predicted token of one window.

        Args:
          stage: `self.coarse` or `self.fine`.
          tokens: int32 `[C, T]`, MASK where unknown.

        Returns:
          int32 `[Cp, T, V]`, at least 1.
        """
        with jax.default_device(self._cpu):
            counts = _frequencies(stage.params, jnp.asarray(tokens, jnp.int32), stage.config)
            return np.asarray(counts)

    def fingerprint(self, stage: Stage, n_frames: int) -> bytes:
        """4 bytes that tell whether another machine computes alike, from a fixed input."""
        config = stage.config
        index = np.arange(config.n_codebooks * n_frames, dtype=np.uint64)
        tokens = (scramble(index) % np.uint64(config.vocab_size + 1)).astype(np.int32)
        counts = self.frequencies(stage, tokens.reshape(config.n_codebooks, n_frames))
        return hashlib.sha256(counts.astype("<i4").tobytes()).digest()[:4]

    def _on_cpu(self, stage: Stage) -> Stage:
        config = dataclasses.replace(stage.config, dtype="float32", attention="xla", dropout=0.0)
        return Stage(jax.device_put(stage.params, self._cpu), config)


def scramble(index: np.ndarray) -> np.ndarray:
    """A fixed pseudo-random uint64 for every index (the finaliser of SplitMix64)."""
    z = index.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@functools.partial(jax.jit, static_argnames="config")
def _frequencies(params: network.Params, tokens: jax.Array, config: ModelConfig) -> jax.Array:
    logits = network.frame_major_logits(params, tokens[None], config)[0]  # [T, Cp, V]
    floor = UNIFORM_SHARE * SCALE / config.vocab_size
    scaled = jax.nn.softmax(logits, axis=-1) * ((1 - UNIFORM_SHARE) * SCALE) + floor
    return jnp.swapaxes(jnp.maximum(1, jnp.round(scaled).astype(jnp.int32)), 0, 1)
