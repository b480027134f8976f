"""Parameters to begin from that already know the codec: less is left to learn."""

import jax
import jax.numpy as jnp

from vampnet_jax.config import ModelConfig
from vampnet_jax.model import Params

FAR = 6.0
"""Standard deviations from the mean code beyond which codes are as if they were so far."""
BANDWIDTH = 1.0
"""How near codes must be to have similar rows in the head, in standard deviations."""


def fit_to_codec(
    params: Params, frequencies: jax.Array, key: jax.Array, config: ModelConfig
) -> Params:
    """Fit freshly drawn parameters to a codec's codes and to how often they occur.

    The embedding starts with standardised codes: a codec's latents can lie close together, far
    from 0, and what tells them apart is then small. Rows of the head begin as random Fourier
    features of the standardised codes (Rahimi and Recht, 2007), so that codes that sound alike get
    similar logits before each has been seen often. Its biases are log frequencies.

    Args:
      params: as `vampnet_jax.init` returns.
      frequencies: how often each token occurs, `[≥C, V]`, above 0, rows sum to 1.
      key: draws the features.
      config: the model's dimensions.
    """
    given, n = config.n_conditioning_codebooks, config.n_codebooks
    p = frequencies[:n]
    embedding = params["embedding"]
    codes = embedding["codebooks"]  # [C, V, d]
    mean = jnp.einsum("cv,cvd->cd", p, codes)
    centred = codes - mean[:, None]
    deviation = jnp.sqrt(jnp.einsum("cv,cvd->cd", p, jnp.square(centred)) + 1e-12)
    kernel = embedding["kernel"] / deviation[..., None]
    embedding = embedding | {
        "mask": mean + embedding["mask"] * deviation,
        "kernel": kernel,
        "bias": -jnp.einsum("cd,cdD->D", mean, kernel),
    }
    scaled = (centred / deviation[:, None])[given:]  # [Cp, V, d]
    # Codes that hardly occur can lie far out; far is far, and cosines of large numbers round badly.
    length = jnp.linalg.norm(scaled, axis=-1, keepdims=True)
    scaled = scaled * jnp.minimum(1.0, FAR / jnp.maximum(length, FAR))
    frequency_key, phase_key = jax.random.split(key)
    shape = (len(scaled), config.latent_dim, config.embedding_dim)
    waves = jax.random.normal(frequency_key, shape) / BANDWIDTH
    phases = jax.random.uniform(phase_key, shape[::2]) * 2 * jnp.pi
    features = jnp.cos(jnp.einsum("cvd,cdD->cvD", scaled, waves) + phases[:, None])
    head = {
        "kernel": jnp.moveaxis(features, 2, 0) * jnp.sqrt(2 / config.embedding_dim),
        "bias": jnp.log(p[given:]),
    }
    return params | {"embedding": embedding, "head": head}
