"""A streamed piece is the piece that `vamp` makes, and its beginning is there before its end."""

import dataclasses

import jax
import numpy as np
import pytest
from small_codecs import random_codec
from small_models import random_model

import vampnet_jax as vampnet
from vampnet_jax import streaming
from vampnet_jax.sampling import SamplingOptions

OPTIONS = {"coarse": SamplingOptions(steps=3), "fine": SamplingOptions(steps=2)}
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def model():
    return random_model(random_codec("dac"))


def music(model, n_samples, batch=2):
    audio = np.random.default_rng(0).normal(0, 0.1, (batch, n_samples)).astype(np.float32)
    tokens = np.asarray(model.codec.encode(audio))
    return audio, tokens, np.asarray(vampnet.masks.periodic(tokens.shape, 5))


@pytest.mark.parametrize(("kind", "frames"), [("dac", 13), ("dac", 131), ("lac", 131)])
def test_the_pieces_joined_are_vamp_decoded(model, kind, frames):
    if kind == "lac":  # with the same transformers
        model = dataclasses.replace(model, codec=random_codec(kind))
    audio, tokens, mask = music(model, frames * model.codec.hop_length - 7)
    want = np.asarray(vampnet.vamp(model, tokens, mask, KEY, **OPTIONS))
    for source in (tokens, audio):
        pieces = list(vampnet.stream(model, source, mask, KEY, **OPTIONS))
        np.testing.assert_array_equal(np.concatenate([p.tokens for p in pieces], -1), want)
        joined = np.concatenate([p.audio for p in pieces], -1)
        np.testing.assert_allclose(joined, np.asarray(model.codec.decode(want)), atol=1e-5)
        starts = np.cumsum([0, *(p.tokens.shape[-1] for p in pieces)])
        assert [p.start for p in pieces] == starts[:-1].tolist()


def test_the_first_piece_takes_one_coarse_window(model, monkeypatch):
    """And no more of the recording is encoded than that needs."""
    audio, _, mask = music(model, 131 * model.codec.hop_length - 7)
    heard, windows = [], []
    encode, fill = model.codec.encode, streaming.fill
    monkeypatch.setattr(
        model.codec, "encode", lambda audio: (heard.append(audio.shape[1]), encode(audio))[1]
    )
    monkeypatch.setattr(
        streaming, "fill", lambda stage, *rest: (windows.append(stage), fill(stage, *rest))[1]
    )
    pieces = vampnet.stream(model, audio, mask, KEY, **OPTIONS)
    first = next(pieces)
    assert first.tokens.shape[-1] > 0
    assert [stage is model.coarse for stage in windows].count(True) == 1
    frames_heard = heard[0] / model.codec.hop_length
    assert heard[1:] == []
    assert frames_heard <= model.coarse_window + model.codec.encoder_context[1]


def test_fine_windows_wait_for_what_they_overlap(model):
    """A long piece comes in many pieces, none of them much behind the coarse windows."""
    _, tokens, mask = music(model, 131 * model.codec.hop_length, batch=1)
    pieces = list(vampnet.stream(model, tokens, mask, KEY, **OPTIONS))
    n_coarse = len(vampnet.vamping.window_starts(131, model.coarse_window))
    assert len(pieces) == n_coarse
    for index, piece in enumerate(pieces[:-1]):
        coarse_end = index * 30 + model.coarse_window  # windows of 40 frames share 10
        behind = coarse_end - (piece.start + piece.tokens.shape[-1])
        assert behind <= 2 * model.fine_window + model.codec.decoder_context[1]


def test_what_does_not_fit_is_refused_at_the_call(model):
    audio, tokens, mask = music(model, 640)
    for source, its_mask in ((tokens[:, :3], mask), (tokens, mask[..., 1:]), (audio[:, :65], mask)):
        with pytest.raises(ValueError, match=r"mask is|the input is"):
            vampnet.stream(model, source, its_mask, KEY)


def test_nothing_to_make_yields_nothing(model):
    tokens = np.zeros((0, 8, 5), np.int32)
    assert list(vampnet.stream(model, tokens, tokens.astype(bool), KEY)) == []
