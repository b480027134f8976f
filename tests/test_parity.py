"""The original's weights give the original's numbers.

`golden/vectors.npz` was computed by the original PyTorch implementation from the small random
checkpoints beside it.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vampnet_jax as vampnet
from vampnet_jax import model
from vampnet_jax.config import ModelConfig
from vampnet_jax.importing import Source, import_model

GOLDEN = Path(__file__).parent / "golden"
CODEC = GOLDEN / "codec.pth"


@pytest.fixture(scope="module")
def vectors() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "vectors.npz") as file:
        return dict(file)


@pytest.fixture(scope="module", params=["coarse", "c2f"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def imported(name: str) -> tuple[dict, ModelConfig]:
    return vampnet.from_torch(GOLDEN / f"{name}.pth", CODEC)


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory: pytest.TempPathFactory) -> vampnet.Model:
    """Both models and the codec through a model directory."""
    directory = tmp_path_factory.mktemp("models") / "golden"
    import_model(Source(GOLDEN / "coarse.pth"), Source(GOLDEN / "c2f.pth"), CODEC, directory)
    return vampnet.load(directory)


def masked_tokens(vectors: dict, name: str, config: ModelConfig) -> jax.Array:
    masked = jnp.where(vectors[f"{name}_mask"] == 1, config.mask_token, vectors[f"{name}_tokens"])
    return masked.astype(jnp.int32)


def relative_error(logits: jax.Array, reference: np.ndarray, config: ModelConfig) -> float:
    """Ours `[B, Cp, T, V]`, theirs `[B, V, T·Cp]` with T slow."""
    b, p, t, v = logits.shape
    theirs = reference.reshape(b, v, t, p).transpose(0, 3, 2, 1)
    return np.abs(np.asarray(logits) - theirs).max() / np.abs(theirs).max()


def test_position_bias_is_the_originals(name, imported, vectors, record_property):
    params, config = imported
    reference = vectors[f"{name}_position_bias"]
    ours = model.position_bias(params, reference.shape[-1], config)
    record_property("error", float(np.abs(ours - reference).max()))
    np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-6)


def test_embedded_latents_are_the_originals(name, imported, vectors, record_property):
    params, config = imported
    ours = model.latents(params, masked_tokens(vectors, name, config), config)  # [B, C, T, d]
    ours = np.asarray(ours).transpose(0, 1, 3, 2).reshape(vectors[f"{name}_latents"].shape)
    record_property("error", float(np.abs(ours - vectors[f"{name}_latents"]).max()))
    np.testing.assert_allclose(ours, vectors[f"{name}_latents"], rtol=0, atol=1e-6)


def test_logits_are_the_originals(name, imported, vectors, record_property):
    params, config = imported
    logits = vampnet.apply(params, masked_tokens(vectors, name, config), config)
    error = relative_error(logits, vectors[f"{name}_logits"], config)
    record_property("error", float(error))
    assert error < 1e-5


def test_logits_of_a_fine_tune_are_the_originals(name, vectors, record_property):
    params, config = vampnet.from_torch(GOLDEN / f"{name}_lora_finetuned.pth", CODEC)
    logits = vampnet.apply(params, masked_tokens(vectors, name, config), config)
    error = relative_error(logits, vectors[f"{name}_lora_logits"], config)
    record_property("error", float(error))
    assert error < 1e-5


@pytest.mark.parametrize("steps", [1, 4, 12])
def test_decoding_gives_the_originals_tokens(name, imported, vectors, steps):
    params, config = imported
    decoded = decode_one_by_one(params, config, vectors, name, steps)
    np.testing.assert_array_equal(decoded, vectors[f"{name}_decoded_{steps}_steps"])


@pytest.mark.parametrize("steps", [1, 4, 12])
def test_a_saved_and_reloaded_model_decodes_the_same(name, reloaded, vectors, steps):
    part = reloaded.coarse if name == "coarse" else reloaded.fine
    decoded = decode_one_by_one(part.params, part.config, vectors, name, steps)
    np.testing.assert_array_equal(decoded, vectors[f"{name}_decoded_{steps}_steps"])


def test_the_reloaded_codec_gives_the_originals_tokens_and_audio(
    reloaded, vectors, record_property
):
    audio = jnp.asarray(vectors["codec_audio"][:, 0])
    codes = reloaded.codec.encode(audio)
    np.testing.assert_array_equal(codes, vectors["codec_codes"])
    decoded = reloaded.codec.decode(jnp.asarray(vectors["codec_codes"], jnp.int32))
    record_property("error", float(np.abs(decoded - vectors["codec_decoded"][:, 0]).max()))
    np.testing.assert_allclose(decoded, vectors["codec_decoded"][:, 0], rtol=0, atol=1e-5)


def decode_one_by_one(params, config, vectors, name, steps) -> np.ndarray:
    options = vampnet.SamplingOptions(
        steps=steps, mask_temperature=0.0, sample_cutoff=0.0, typical_mass=None
    )
    tokens = jnp.asarray(vectors[f"{name}_tokens"], jnp.int32)
    mask = jnp.asarray(vectors[f"{name}_mask"], bool)
    examples = [
        vampnet.generate(params, t[None], m[None], jax.random.key(0), config, options)
        for t, m in zip(tokens, mask, strict=True)
    ]
    return np.concatenate(examples)
