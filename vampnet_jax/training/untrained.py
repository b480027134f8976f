"""Parameters to begin from that already know the codec: less is left to learn."""

import jax
import jax.numpy as jnp

from vampnet_jax.config import ModelConfig
from vampnet_jax.model import Params

BANDWIDTH = 1.0
"""How near codes must be to have similar rows in the head, in standard deviations."""


def fit_to_codec(
    params: Params, frequencies: jax.Array, key: jax.Array, config: ModelConfig
) -> Params:
    """Fit freshly drawn parameters to a codec's codes and to how often they occur.

    The embedding starts with whitened codes: a codec's latents can lie close together, far from 0,
    and what tells them apart is then small. Rows of the head begin as random Fourier features of
    the whitened codes (Rahimi and Recht, 2007), so that codes that sound alike get similar
    logits before each has been seen often. Its biases are log frequencies.

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
    covariance = jnp.einsum("cv,cvd,cve->cde", p, centred, centred)
    values, axes = jnp.linalg.eigh(covariance)
    values = jnp.maximum(values, 1e-4 * values[:, -1:] + 1e-12)
    # Symmetric, so that no choice of the signs of axes is in it.
    whitening, colouring = (
        jnp.einsum("cde,ce,cfe->cdf", axes, values**power, axes) for power in (-0.5, 0.5)
    )
    kernel = jnp.einsum("cde,ceD->cdD", whitening, embedding["kernel"])
    embedding = embedding | {
        "mask": mean + jnp.einsum("cd,cde->ce", embedding["mask"], colouring),
        "kernel": kernel,
        "bias": -jnp.einsum("cd,cdD->D", mean, kernel),
    }
    white = jnp.einsum("cvd,cde->cve", centred, whitening)[given:]  # [Cp, V, d]
    frequency_key, phase_key = jax.random.split(key)
    shape = (len(white), config.latent_dim, config.embedding_dim)
    waves = jax.random.normal(frequency_key, shape) / BANDWIDTH
    phases = jax.random.uniform(phase_key, shape[::2]) * 2 * jnp.pi
    features = jnp.cos(jnp.einsum("cvd,cdD->cvD", white, waves) + phases[:, None])
    head = {
        "kernel": jnp.moveaxis(features, 2, 0) * jnp.sqrt(2 / config.embedding_dim),
        "bias": jnp.log(p[given:]),
    }
    return params | {"embedding": embedding, "head": head}
