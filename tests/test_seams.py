"""Long pieces have no seams: where a window ends, level and spectral flux are those of anywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vampnet_jax as vampnet
from vampnet_jax.evaluation.artefacts import seam_ranks, window_borders
from vampnet_jax.sampling import SamplingOptions
from vampnet_jax.vamping import independent, window_starts

N_EXAMPLES = 4
MEASURES = ("level", "flux")
"""What a seam would disturb, in the order of `seam_ranks`."""


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


def unusual(audio: np.ndarray, model: vampnet.Model, borders: list[int], measure: str) -> float:
    """How many standard errors the mean rank lies above ½, which is that of places at random."""
    rate, hop = model.codec.sample_rate, model.codec.hop_length
    ranks = np.concatenate([seam_ranks(clip, rate, hop, borders) for clip in audio], axis=1)
    own = ranks[MEASURES.index(measure)]
    assert len(own) >= 12
    return (own.mean() - 0.5) * np.sqrt(12 * len(own))


@pytest.mark.parametrize("stage", ["coarse", "fine"])
@pytest.mark.parametrize("measure", MEASURES)
def test_window_borders_are_like_anywhere_else(piece, stage, measure):
    tiny, n_frames, audio = piece
    window = getattr(tiny, f"{stage}_window")
    starts = window_starts(n_frames, window)
    passes = independent(starts, window) if stage == "fine" else [[start] for start in starts]
    assert unusual(audio, tiny, window_borders(passes, window, n_frames), measure) < 3


@pytest.mark.parametrize("measure", MEASURES)
def test_a_cut_would_be_noticed(piece, measure):
    """The same statistics tell windows that fade and were merely put side by side."""
    tiny, n_frames, audio = piece
    window, hop = tiny.coarse_window, tiny.codec.hop_length
    borders = list(range(window, n_frames, window))
    fade = np.linspace(1, 0.2, window * hop, dtype=np.float32)
    cuts = []
    for clip, other in zip(audio, np.roll(audio, 1, axis=0), strict=True):
        sources = [clip, other] * len(borders)
        cuts.append(
            [
                source[i * window * hop : (i + 1) * window * hop] * fade
                for i, source in enumerate(sources[: len(borders) + 1])
            ]
        )
    joined = np.stack([np.concatenate(parts) for parts in cuts])
    assert unusual(joined, tiny, borders, measure) > 3
