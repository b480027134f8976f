"""Onsets and beats are found where they are, and their masks keep the frames around them."""

import jax
import numpy as np
import pytest

from vampnet_jax import rhythm

SAMPLE_RATE, HOP = 24_000, 480  # 50 frames per second


def clicks(times: list[float], loudness: list[float], seconds: float) -> np.ndarray:
    """Short decaying noise bursts in near silence."""
    noise = np.random.default_rng(0)
    audio = 1e-4 * noise.standard_normal(int(seconds * SAMPLE_RATE))
    burst = noise.standard_normal(1200) * np.exp(-np.arange(1200) / 200)
    for time, gain in zip(times, loudness, strict=True):
        start = int(time * SAMPLE_RATE)
        audio[start : start + len(burst)] += gain * burst[: len(audio) - start]
    return audio.astype(np.float32)


def test_onsets_are_found_within_two_frames():
    times = [0.4, 1.1, 1.5, 2.3, 2.9]
    found = rhythm.find_onsets(clicks(times, [0.5] * 5, 3.5), SAMPLE_RATE, HOP)
    assert all(np.abs(found - 50 * time).min() <= 2 for time in times)


def test_beats_and_downbeats_of_a_metronome():
    times = [0.3 + 0.5 * i for i in range(24)]
    accents = [1.0 if i % 4 == 2 else 0.3 for i in range(24)]
    beats, downbeats = rhythm.find_beats(clicks(times, accents, 12.5), SAMPLE_RATE, HOP)
    clicks_hit = [i for i, time in enumerate(times) if np.abs(beats - 50 * time).min() <= 2]
    assert len(clicks_hit) >= 22
    accented = 50 * np.array(times)[2::4]
    distance = np.abs(beats[downbeats][:, None] - accented).min(axis=1)
    assert (distance <= 2).mean() > 0.8


@pytest.mark.parametrize("n_samples", [0, 500, 48_000])
def test_silence_and_fragments_have_no_rhythm(n_samples):
    silence = np.zeros(n_samples, np.float32)
    assert len(rhythm.find_onsets(silence, SAMPLE_RATE, HOP)) == 0
    beats, downbeats = rhythm.find_beats(silence, SAMPLE_RATE, HOP)
    assert len(beats) == len(downbeats) == 0


def test_onset_keeps_spans_clipped_at_both_ends():
    kept = ~np.asarray(rhythm.onset((2, 20), np.array([1, 10, 19]), width=3))
    np.testing.assert_array_equal(
        np.flatnonzero(kept[0]), [0, 1, 2, 3, *range(7, 13), *range(16, 20)]
    )
    np.testing.assert_array_equal(kept[0], kept[1])
    assert rhythm.onset((2, 20), np.zeros(0, int), width=3).all()


def test_beat_keeps_before_and_after():
    kept = ~np.asarray(rhythm.beat((1, 12), np.array([0, 6]), before=1, after=2))
    np.testing.assert_array_equal(np.flatnonzero(kept[0]), [0, 1, 5, 6, 7])


def test_overlapping_spans_are_kept_once_and_entirely():
    kept = ~np.asarray(rhythm.beat((1, 12), np.array([3, 5]), before=2, after=4))
    np.testing.assert_array_equal(np.flatnonzero(kept[0]), range(1, 9))


def test_beat_dropout_leaves_out_whole_beats():
    beats = np.arange(5, 4000, 10)
    keep = ~np.asarray(
        rhythm.beat((1, 4000), beats, before=1, after=2, key=jax.random.key(0), dropout=0.3)
    )
    spans = np.stack([keep[0, beats - 1], keep[0, beats], keep[0, beats + 1]])
    assert (spans == spans[:1]).all()
    assert 0.6 < spans.mean() < 0.8


def test_choose_beats():
    found = rhythm.Rhythm(np.zeros(0, int), np.arange(0, 80, 10), np.arange(8) % 4 == 1)
    np.testing.assert_array_equal(rhythm.choose_beats(found, downbeats_only=True), [10, 50])
    np.testing.assert_array_equal(rhythm.choose_beats(found, every=3), [0, 30, 60])
