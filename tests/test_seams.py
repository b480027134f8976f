"""Long pieces have no seams: where a window ends, level and spectral flux are those of anywhere."""

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest

import vampnet_jax as vampnet
from vampnet_jax.sampling import SamplingOptions
from vampnet_jax.vamping import window_starts

N_EXAMPLES = 4
NEAR = 2
"""A border is this many frames to either side of where one window takes over from another."""


@pytest.fixture(scope="module")
def piece():
    """Music from nothing, several windows long: model, frames, audio float32 [B, samples]."""
    tiny = vampnet.load("tiny")
    n_frames = 4 * tiny.coarse_window
    shape = (N_EXAMPLES, tiny.codec.n_codebooks, n_frames)
    tokens = vampnet.vamp(
        tiny,
        jnp.zeros(shape, jnp.int32),
        jnp.ones(shape, bool),
        jax.random.key(0),
        SamplingOptions(steps=8),
        SamplingOptions(steps=2),
    )
    return tiny, n_frames, np.asarray(tiny.codec.decode(tokens))


def changes(audio: np.ndarray, hop: int, rate: int) -> dict[str, np.ndarray]:
    """What a seam would disturb, at every frame: level steps in dB and flux, both `[frames]`."""
    rms = librosa.feature.rms(y=audio, frame_length=2 * hop, hop_length=hop)[0]
    level = 20 * np.log10(np.maximum(rms, 1e-5))
    flux = librosa.onset.onset_strength(y=audio, sr=rate, hop_length=hop, center=True)
    return {"level": np.abs(np.diff(level, prepend=level[:1])), "flux": flux}


def ranks_at(borders: list[int], values: np.ndarray) -> list[float]:
    """For each border the share of all places whose largest value nearby is below its own."""
    width = 2 * NEAR + 1
    nearby = np.lib.stride_tricks.sliding_window_view(values, width).max(axis=1)
    return [float((nearby < nearby[b - NEAR]).mean()) for b in borders]


def borders_of(n_frames: int, window: int) -> list[int]:
    """Frames at which a window's own tokens begin, after those it shares with the one before."""
    starts = window_starts(n_frames, window)
    return [start + window for start in starts[:-1]]


def unusual(ranks: list[float]) -> float:
    """How many standard errors the mean rank lies above ½, which is that of places at random."""
    return (np.mean(ranks) - 0.5) * np.sqrt(12 * len(ranks))


@pytest.mark.parametrize("stage", ["coarse", "fine"])
@pytest.mark.parametrize("measure", ["level", "flux"])
def test_window_borders_are_like_anywhere_else(piece, stage, measure):
    tiny, n_frames, audio = piece
    borders = borders_of(n_frames, getattr(tiny, f"{stage}_window"))
    ranks = []
    for clip in audio:
        values = changes(clip, tiny.codec.hop_length, tiny.codec.sample_rate)[measure]
        ranks += ranks_at(borders, values[:n_frames])
    assert len(ranks) >= 12
    assert unusual(ranks) < 3


@pytest.mark.parametrize("measure", ["level", "flux"])
def test_a_cut_would_be_noticed(piece, measure):
    """The same statistics tell windows that fade and were merely put side by side."""
    tiny, n_frames, audio = piece
    window, hop = tiny.coarse_window, tiny.codec.hop_length
    borders = list(range(window, n_frames, window))
    ranks = []
    for clip, other in zip(audio, np.roll(audio, 1, axis=0), strict=True):
        sources = [clip, other] * len(borders)
        cut = [
            source[i * window * hop : (i + 1) * window * hop] * np.linspace(1, 0.2, window * hop)
            for i, source in enumerate(sources[: len(borders) + 1])
        ]
        values = changes(np.concatenate(cut), hop, tiny.codec.sample_rate)[measure]
        ranks += ranks_at(borders, values[:n_frames])
    assert unusual(ranks) > 3
