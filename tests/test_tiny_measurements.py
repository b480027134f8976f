"""The measurements of `recipes/tiny` that choices rest on tell what they say they tell."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

import vampnet_jax as vampnet
from vampnet_jax.evaluation.conditions import read_experiments
from vampnet_jax.evaluation.distances import SAMPLE_RATE

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny"
pytestmark = pytest.mark.usefixtures("tiny_recipe")


def tone(*frequencies, seconds=4.0):
    time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return sum(0.1 * np.sin(2 * np.pi * f * time) for f in frequencies).astype(np.float32)


def test_the_model_in_the_box_is_sampled_as_the_recipe_chose():
    import assemble
    from choose_sampling import options_of

    tiny = vampnet.load("tiny")
    assert (tiny.coarse_sampling, tiny.fine_sampling) == (
        assemble.COARSE_SAMPLING,
        assemble.FINE_SAMPLING,
    )
    chosen = options_of("codebook by codebook, top-p 0.9, likeliest", steps=24)
    assert chosen == (tiny.coarse_sampling, tiny.fine_sampling)
    assert {name: tiny.presets[name] for name in assemble.PRESETS} == assemble.PRESETS


def test_the_evaluation_is_of_the_presets_in_the_box():
    tiny = vampnet.load("tiny")
    rows = read_experiments(RECIPE / "prompts.yaml")["presets"]
    assert len(rows) == 3
    for row in rows:
        assert row.prompt == tiny.presets[row.name.replace(" ", "-")]


def test_chroma_correlation_hears_notes_and_not_level():
    from clips import chroma_correlation

    chord = tone(262, 330, 392)
    assert chroma_correlation(chord, 0.3 * chord) == pytest.approx(1, abs=0.01)
    assert chroma_correlation(chord, tone(277, 370, 440)) < 0
    assert chroma_correlation(chord, np.zeros_like(chord)) == 0


def test_clips_are_spread_over_a_part_and_as_loud_as_each_other(tmp_path):
    import json

    from clips import clips

    index = {}
    for name, level in (("a/1", 0.1), ("a/2", 0.4), ("b/1", 0.2), ("b/short", 0.2)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        seconds = 2 if name == "b/short" else 6
        audio = level * np.sign(tone(300, seconds=seconds))
        soundfile.write(tmp_path / f"{name}.wav", audio, SAMPLE_RATE, subtype="FLOAT")
        loudness = 20 * np.log10(level)
        index[name] = {"seconds": float(seconds), "loudness": loudness}
    (tmp_path / "index.json").write_text(json.dumps(index))
    split = {"train": ["a/2"], "validation": [], "test": ["a/1", "b/1", "b/short", "b/gone"]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    found = list(clips(tmp_path, tmp_path / "split.json", "test", 2, seconds=3.0))
    assert [source for source, _ in found] == ["a", "a", "b", "b"]
    for _, audio in found:
        assert len(audio) == 3 * SAMPLE_RATE
        assert np.abs(audio).max() == pytest.approx(10 ** (-24 / 20), rel=1e-3)


def test_statistics_from_nothing_tell_one_note_silence_and_noise():
    from from_nothing import statistics

    note, noise = tone(440, seconds=9), np.random.default_rng(0).normal(0, 0.1, 9 * SAMPLE_RATE)
    steady = statistics(note)
    assert steady["level: standard deviation, dB"] < 0.1
    assert steady["pitch classes: entropy of the piece, bits"] < 1.5
    assert steady["pitch classes: share that changes in a second"] < 0.01
    even = statistics(noise.astype(np.float32))
    assert even["pitch classes: entropy of the piece, bits"] > 3.55
    note[-3 * SAMPLE_RATE :] *= 0.01
    fading = statistics(note)
    assert fading["level: last third less first, dB"] == pytest.approx(-40, abs=0.5)
    assert fading["level: quietest second below the mean, dB"] > 20


def test_what_equals_the_extreme_to_two_places_is_inside():
    from from_nothing import is_outside

    music = [{"x": 1.0}, {"x": 3.564}]
    assert not is_outside({"x": 3.5649}, music)
    assert is_outside({"x": 3.566}, music)
    assert is_outside({"x": 0.99}, music)


def test_a_buzz_is_like_itself_a_frame_later():
    from measure_buzz import likeness

    rng = np.random.default_rng(0)
    frame = rng.normal(size=960)
    assert likeness(np.tile(frame, 25), 960) > 0.99
    assert likeness(np.tile(frame, 25), 1440) < 0.3
    assert likeness(rng.normal(size=24_000), 960) < 0.1


def test_int8_weights_are_within_half_a_step():
    from rounding import to_int8

    weights = jnp.asarray(np.random.default_rng(0).normal(size=(3, 50, 4)) * [1, 10, 0.1, 0])
    error = jnp.abs(to_int8(weights) - weights).max(axis=(0, 1))
    assert (error <= jnp.abs(weights).max(axis=(0, 1)) / 254 * 1.001).all()
    assert error[1] > 0
    bias = jnp.arange(3.0) / 7
    assert (to_int8(bias) == bias).all()
