"""A model before its first step already knows the codec's codes and how often they occur."""

import jax
import jax.numpy as jnp
import numpy as np

import vampnet_jax as vampnet
from vampnet_jax.training.untrained import fit_to_codec

MODEL = vampnet.ModelConfig(
    n_codebooks=3,
    n_conditioning_codebooks=1,
    n_layers=1,
    n_heads=2,
    embedding_dim=64,
    vocab_size=256,
    latent_dim=4,
)


def fitted() -> tuple[dict, np.ndarray, np.ndarray]:
    """Parameters, codes that lie close together far from 0, and frequencies of tokens."""
    rng = np.random.default_rng(0)
    codes = (5 + rng.normal(size=(3, 256, 4)) * [0.1, 0.01, 0.2, 0.05]).astype(np.float32)
    frequencies = rng.random((3, 256)).astype(np.float32)
    frequencies /= frequencies.sum(axis=1, keepdims=True)
    params = vampnet.init(jax.random.key(0), MODEL, codes)
    return fit_to_codec(params, frequencies, jax.random.key(1), MODEL), codes, frequencies


def test_embedded_music_is_centred_and_as_wide_along_every_axis_of_the_codes():
    params, codes, frequencies = fitted()
    embedding = params["embedding"]
    parts = np.einsum("cvd,cdD->cvD", codes, embedding["kernel"])  # what each codebook adds
    means = np.einsum("cv,cvD->cD", frequencies, parts)
    np.testing.assert_allclose(means.sum(0) + embedding["bias"], 0, atol=2e-3)
    untouched = vampnet.init(jax.random.key(0), MODEL, codes)["embedding"]["kernel"]
    mean = np.einsum("cv,cvd->cd", frequencies, codes)
    deviation = np.sqrt(np.einsum("cv,cvd->cd", frequencies, (codes - mean[:, None]) ** 2))
    seen = embedding["kernel"] * deviation[..., None]  # of latents of unit variance
    np.testing.assert_allclose(seen, untouched, rtol=1e-3)


def test_the_mask_vector_is_embedded_as_a_code_might_be():
    params, codes, frequencies = fitted()
    mean = np.einsum("cv,cvd->cd", frequencies, codes)
    offset = params["embedding"]["mask"] - mean
    deviation = np.sqrt(np.einsum("cv,cvd->cd", frequencies, (codes - mean[:, None]) ** 2))
    assert np.abs(offset / deviation).max() < 5


def test_codes_that_lie_near_each_other_get_similar_rows_in_the_head():
    params, codes, _ = fitted()
    for codebook in (1, 2):
        rows = np.asarray(params["head"]["kernel"])[:, codebook - 1]  # [D, V]
        white = (codes[codebook] - codes[codebook].mean(0)) / codes[codebook].std(0)
        distance = np.linalg.norm(white[:, None] - white[None], axis=-1)
        product = rows.T @ rows
        near, far = (distance > 0) & (distance < 0.5), distance > 3
        assert product[near].mean() > 0.8
        assert np.abs(product[far].mean()) < 0.1
        np.testing.assert_allclose(np.diag(product), 1, atol=0.5)


def test_before_the_first_step_tokens_are_predicted_about_as_often_as_they_occur():
    params, _, frequencies = fitted()
    np.testing.assert_allclose(params["head"]["bias"], np.log(frequencies[1:]), rtol=1e-5)
    tokens = jnp.full((1, 3, 8), MODEL.mask_token).at[:, 0].set(7)
    loss = -jax.nn.log_softmax(vampnet.apply(params, tokens, MODEL))[0].mean(1)  # [Cp, V]
    entropy = -(frequencies * np.log(frequencies)).sum(1)[1:]
    expected = (np.asarray(loss) * frequencies[1:]).sum(1)
    assert (expected < entropy + 1).all()  # logits of unit variance cost half a nat
