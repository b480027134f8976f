"""Pictures show what happened: spectrograms where the energy is, tokens where they were kept."""

import numpy as np
import pytest
from matplotlib import image

from vampnet_jax import figures

SAMPLE_RATE = 8000


def tone(frequency: float, seconds: float) -> np.ndarray:
    return np.sin(2 * np.pi * frequency * np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE)


def draw(path, n_frames=100, **changes):
    tokens = np.random.default_rng(0).integers(0, 64, (8, n_frames))
    options = {
        "title": "a clip",
        "tokens": tokens,
        "mask": np.arange(n_frames) % 7 > np.zeros((8, 1)),
        "frame_rate": 50.0,
        "before": tone(440, 2.0),
        "after": tone(880, 2.0),
        "sample_rate": SAMPLE_RATE,
    }
    figures.draw_variation(path, **options | changes)
    return image.imread(path)


@pytest.mark.parametrize("frequency", [200, 1000, 3000])
def test_a_tone_is_loudest_in_its_own_band(frequency):
    decibels = figures.spectrogram(tone(frequency, 1.0), SAMPLE_RATE)
    edges = np.linspace(0, figures._hz_to_mel(SAMPLE_RATE / 2), figures.N_BANDS + 1)
    loudest = int(np.median(decibels.argmax(axis=0)))
    assert abs(figures._mel_to_hz(edges[loudest : loudest + 2]) - frequency).min() < 60


def test_time_runs_from_left_to_right():
    audio = np.concatenate([np.zeros(SAMPLE_RATE), tone(1000, 1.0)])
    level = figures.spectrogram(audio, SAMPLE_RATE).max(axis=0)
    n = len(level)
    assert level[: n // 3].max() < level[2 * n // 3 :].min() - 60


def test_long_clips_have_as_many_columns_as_a_picture():
    assert figures.spectrogram(np.zeros(SAMPLE_RATE * 60), SAMPLE_RATE).shape == (
        figures.N_BANDS,
        figures.MAX_COLUMNS,
    )


@pytest.mark.parametrize("n_samples", [1, 100, 5000])
def test_short_clips_and_silence_can_be_drawn(tmp_path, n_samples):
    silence = np.zeros(n_samples, np.float32)
    assert np.isfinite(figures.spectrogram(silence, SAMPLE_RATE)).all()
    draw(tmp_path / "p.png", n_frames=1 + n_samples // 160, before=silence, after=silence)


def test_kept_tokens_are_coloured_and_generated_ones_are_not():
    tokens = np.array([[0, 20, 40, 63]] * 2)
    mask = np.array([[True, False, False, True], [True, True, False, True]])
    colours = figures._token_colours(tokens, mask)
    for codebook, frame in np.ndindex(2, 4):
        is_grey = np.allclose(colours[codebook, frame], figures.GENERATED)
        assert is_grey == mask[codebook, frame]
    assert not np.allclose(colours[0, 1], colours[0, 2])


def test_columns_of_many_frames_are_mixed_by_the_share_kept():
    n_frames = 4 * figures.MAX_COLUMNS
    mask = np.ones((1, n_frames), bool)
    mask[:, ::4] = False
    colours = figures._token_colours(np.zeros((1, n_frames), int), mask)
    assert colours.shape == (1, figures.MAX_COLUMNS, 3)
    only = figures._token_colours(np.zeros((1, 1), int), np.zeros((1, 1), bool))[0, 0]
    np.testing.assert_allclose(
        colours, np.broadcast_to(0.25 * only + 0.75 * figures.GENERATED, colours.shape)
    )


def test_a_picture_has_a_panel_for_each_thing_at_hand(tmp_path):
    heights = [
        draw(tmp_path / f"{i}.png", **changes).shape[0]
        for i, changes in enumerate([{}, {"before": None}, {"before": None, "after": None}])
    ]
    assert heights[0] > heights[1] > heights[2] > 50
    assert len(list(tmp_path.iterdir())) == 3


def test_a_picture_of_music_from_nothing_has_no_empty_mask(tmp_path):
    shape = (8, 100)
    heights = [
        draw(tmp_path / f"{i}.png", before=None, mask=mask).shape[0]
        for i, mask in enumerate([np.ones(shape, bool), np.arange(100) % 7 * np.ones(shape) > 0])
    ]
    assert heights[0] < heights[1]


def test_a_title_is_not_read_as_a_formula(tmp_path):
    draw(tmp_path / "p.png", title="cost $_$ and $5, variation 1")


def test_matplotlib_is_imported_only_to_draw():
    import subprocess
    import sys

    code = (
        "import sys, vampnet_jax.figures\n"
        "assert 'matplotlib' not in sys.modules, 'imported before a picture is drawn'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
