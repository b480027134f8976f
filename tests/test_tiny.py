"""The model in the box is complete, small, trained, and knows its own codec."""

import json

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest

import vampnet_jax as vampnet
from codec_bridge import audio
from vampnet_jax.release import MODELS_IN_THE_BOX
from vampnet_jax.training.objective import draw_masks, masked_sums

TINY = MODELS_IN_THE_BOX / "tiny"
UNIFORM = np.log(1024)


@pytest.fixture(scope="module")
def tiny():
    return vampnet.load("tiny")


@pytest.fixture(scope="module")
def example(tiny):
    """The clip that ships with the model, float32 [1, samples], as loud as what it learnt from."""
    clip = audio.resample(audio.mono(audio.read(TINY / "example.flac")), tiny.codec.sample_rate)
    return audio.normalise(clip, -24.0)[0].samples


@pytest.fixture(scope="module")
def tokens(tiny, example):
    return tiny.codec.encode(example)


def mel_distance(a, b):
    """VampNet, section 4: two resolutions, mean |difference| of log10 mel magnitudes at 24 kHz."""
    total = 0.0
    for window, mels in ((2048, 150), (512, 80)):
        x, y = (
            librosa.feature.melspectrogram(
                y=np.asarray(clip), sr=24_000, n_fft=window, hop_length=window // 4,
                n_mels=mels, power=1.0,
            )
            for clip in (a, b)
        )  # fmt: skip
        total += np.abs(np.log10(np.maximum(x, 1e-5)) - np.log10(np.maximum(y, 1e-5))).mean()
    return total


def test_everything_for_a_release_is_there_and_small():
    names = {file.name for file in TINY.iterdir()}
    assert {"config.json", "coarse.safetensors", "fine.safetensors", "codec.safetensors"} <= names
    assert {"MODEL_CARD.md", "COPYING", "COPYING-GPL-3", "frequencies.safetensors"} <= names
    assert "example.flac" in names
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 24 * 2**20


def test_the_models_belong_to_the_codec(tiny):
    description = json.loads((TINY / "config.json").read_text())
    assert description["codec"]["fingerprint"] == tiny.codec.fingerprint
    for stage in (tiny.coarse, tiny.fine):
        used = stage.config.n_codebooks
        np.testing.assert_allclose(
            stage.params["embedding"]["codebooks"], tiny.codec.codebooks[:used], rtol=1e-2
        )


def test_the_example_is_ten_seconds(tiny, example):
    assert example.shape == (1, 10 * tiny.codec.sample_rate)


def test_the_codec_keeps_the_example_recognisable(tiny, example, tokens):
    random = np.random.default_rng(0).integers(0, 1024, tokens.shape, dtype=np.int32)
    near = mel_distance(example[0], tiny.codec.decode(tokens)[0])
    far = mel_distance(example[0], tiny.codec.decode(random)[0])
    assert near < 0.7 * far


@pytest.mark.parametrize(("name", "margin"), [("coarse", 2.5), ("fine", 1.5)])
def test_masked_tokens_of_the_example_are_predicted(tiny, tokens, name, margin):
    stage, window = getattr(tiny, name), getattr(tiny, f"{name}_window")
    config = stage.config
    batch = tokens[:, : config.n_codebooks, :window]
    ratios = jnp.array([0.5])
    mask = draw_masks(jax.random.split(jax.random.key(0), 1), ratios, batch.shape[2], config)
    sums = masked_sums(stage.params, batch, mask, config)
    loss = float(sums.log_loss.sum() / sums.tokens.sum())
    assert loss < UNIFORM - margin  # a unigram model of its codes comes to 6.9 as well


def test_a_small_variation_is_closer_than_a_large_one(tiny, example, tokens):
    """And both are far from random tokens."""
    key, rate = jax.random.key(0), tiny.codec.sample_rate / tiny.codec.hop_length

    def variation(preset):
        mask = tiny.presets[preset].mask(tokens.shape, key, frame_rate=rate)
        return vampnet.vamp(tiny, tokens, mask, key)

    random = jax.random.randint(key, tokens.shape, 0, 1024)
    codec, small, large, far = (
        mel_distance(example[0], tiny.codec.decode(made)[0])
        for made in (tokens, variation("small-variation"), variation("large-variation"), random)
    )
    assert codec < small < large < (codec + far) / 2
