"""A prompt keeps what its options say, combined in the right order."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codec_bridge.errors import InputError
from vampnet_jax import masks
from vampnet_jax.prompts import DEFAULT_PRESET, PRESETS, Prompt, frames, preset
from vampnet_jax.rhythm import Rhythm

SHAPE = (8, 100)
RATE = 50.0
RHYTHM = Rhythm(np.array([10, 60]), np.array([5, 30, 55, 80]), np.array([0, 1, 0, 0], bool))


def mask_of(prompt: Prompt, key: int = 0, pass_index: int = 0, shape=SHAPE) -> np.ndarray:
    mask = prompt.mask(
        shape, jax.random.key(key), frame_rate=RATE, rhythm=RHYTHM, pass_index=pass_index
    )
    assert mask.shape == shape
    return np.asarray(mask)


def kept_frames(prompt: Prompt, codebook: int = 0, **options) -> list[int]:
    return np.flatnonzero(~mask_of(prompt, **options)[codebook]).tolist()


def test_without_options_everything_is_generated():
    assert mask_of(Prompt()).all()


def test_periodic_keeps_every_nth_frame_at_the_offset():
    assert kept_frames(Prompt(periodic=20, offset=3)) == [3, 23, 43, 63, 83]
    assert kept_frames(Prompt(periodic=50, width=3, offset=10)) == [10, 11, 59, 60, 61]


def test_periodic_offset_is_drawn_from_the_key():
    drawn = {min(kept_frames(Prompt(periodic=10), key=key)) for key in range(30)}
    assert drawn <= set(range(10))
    assert len(drawn) > 5
    assert kept_frames(Prompt(periodic=10), key=3) == kept_frames(Prompt(periodic=10), key=3)


@pytest.mark.parametrize("period", [2, 5, 7, 8, 13, 16])
def test_passes_of_feedback_meet_every_offset(period):
    shape = (8, 6 * period)
    passes = [
        kept_frames(Prompt(periodic=period), pass_index=i, shape=shape)[0] for i in range(period)
    ]
    assert sorted(passes) == list(range(period))


def test_prefix_and_suffix_are_seconds():
    assert kept_frames(Prompt(prefix=0.21, suffix=0.1), codebook=7) == [*range(11), *range(95, 100)]


def test_regions_are_generated_and_all_outside_is_kept():
    prompt = Prompt(regions=((0.5, 1.0), (1.5, 1.6)))
    generated = np.flatnonzero(mask_of(prompt)[7]).tolist()
    assert generated == [*range(25, 50), *range(75, 80)]


def test_other_prompts_apply_within_regions_only():
    prompt = Prompt(regions=((0.5, 1.0),), periodic=10, offset=0, dropout=0.0)
    mask = mask_of(prompt)
    assert not mask[:, :25].any()
    assert not mask[:, 50:].any()
    assert np.flatnonzero(~mask[0, 25:50]).tolist() == [5, 15]
    assert mask[4:, 25:50].all()
    dropped = mask_of(Prompt(regions=((0.5, 1.0),), dropout=1.0, upper_codebooks=0))
    np.testing.assert_array_equal(dropped, mask_of(Prompt(regions=((0.5, 1.0),))))


def test_random_keeps_a_share_of_tokens():
    mask = mask_of(Prompt(random=0.7, upper_codebooks=8), shape=(8, 5000))
    assert abs(mask.mean() - 0.7) < 0.02


def test_onset_and_beat_keep_frames_around_what_was_heard():
    assert kept_frames(Prompt(onset=2)) == [8, 9, 10, 11, 58, 59, 60, 61]
    assert kept_frames(Prompt(beat=0.04)) == [5, 6, 30, 31, 55, 56, 80, 81]
    assert kept_frames(Prompt(beat_before=0.04)) == [3, 4, 28, 29, 53, 54, 78, 79]
    assert kept_frames(Prompt(beat=0.02, beat_downbeats=True)) == [30]
    assert kept_frames(Prompt(beat=0.02, beat_every=2)) == [5, 55]
    assert kept_frames(Prompt(beat=0.02, beat_dropout=1.0)) == []


def test_prompts_that_keep_are_united():
    both = mask_of(Prompt(periodic=20, offset=1, prefix=0.2, onset=2, beat=0.02))
    apart = [Prompt(periodic=20, offset=1), Prompt(prefix=0.2, upper_codebooks=4)]
    apart += [Prompt(onset=2), Prompt(beat=0.02)]
    np.testing.assert_array_equal(both, np.logical_and.reduce([mask_of(p) for p in apart]))


def test_dropout_takes_frames_away_but_not_kept_codebooks():
    prompt = Prompt(periodic=1, dropout=0.4, keep_codebooks=2, upper_codebooks=8)
    mask = mask_of(prompt, shape=(8, 5000))
    assert not mask[:2].any()
    assert abs(mask[2:].mean() - 0.4) < 0.02
    assert (mask[2:] == mask[2]).all()


def test_upper_codebooks_win_over_kept_ones():
    mask = mask_of(Prompt(keep_codebooks=6, upper_codebooks=3))
    assert not mask[:3].any()
    assert mask[3:].all()


@pytest.mark.parametrize(
    ("prompt", "first"),
    [
        (Prompt(periodic=5), 4),
        (Prompt(onset=1), 4),
        (Prompt(beat=0.1), 4),
        (Prompt(random=0.5), 4),
        (Prompt(periodic=5, upper_codebooks=6), 6),
        (Prompt(prefix=1.0), None),
        (Prompt(regions=((0.0, 1.0),)), None),
        (Prompt(keep_codebooks=3), None),
    ],
)
def test_sparse_prompts_leave_the_upper_codebooks_to_the_model(prompt, first):
    assert prompt.first_generated_codebook == first


def test_mask_works_under_jit_and_vmap():
    prompt = Prompt(periodic=9, dropout=0.3, random=0.9, beat=0.04, beat_dropout=0.5)
    keys = jax.random.split(jax.random.key(1), 3)

    def of(key):
        return prompt.mask(SHAPE, key, frame_rate=RATE, rhythm=RHYTHM)

    together = jax.jit(jax.vmap(of))(keys)
    for key, mask in zip(keys, together, strict=True):
        np.testing.assert_array_equal(mask, of(key))


@pytest.mark.parametrize(
    ("name", "period", "first"),
    [
        ("timbre-transfer", 2, 1),
        ("small-variation", 5, 4),
        ("medium-variation", 7, 4),
        ("large-variation", 13, 4),
        ("beat-small-variation", 7, 4),
        ("beat-medium-variation", 13, 4),
        ("beat-large-variation", 0, 4),
        ("unconditional", 0, 1),
    ],
)
def test_presets_are_the_originals(name, period, first):
    assert (PRESETS[name].periodic, PRESETS[name].upper_codebooks) == (period, first)
    mask = mask_of(PRESETS[name])
    assert mask[first:].all()
    assert mask[:first].any()  # none of them copies the input
    assert mask[:first].all() == (name == "unconditional")


def test_beat_presets_follow_the_beat_and_the_default_exists():
    assert PRESETS["beat-large-variation"].beat == 0.08
    assert PRESETS["beat-small-variation"].beat == 0.05
    assert kept_frames(PRESETS["beat-large-variation"])[:4] == [5, 6, 7, 8]
    assert PRESETS["large-variation"].dropout == 0.2
    assert DEFAULT_PRESET in PRESETS


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"periodic": -1}, "periodic is -1"),
        ({"width": 0}, "width is 0"),
        ({"dropout": 1.5}, "dropout is 1.5"),
        ({"random": float("nan")}, "random is nan"),
        ({"prefix": -0.5}, "prefix is -0.5"),
        ({"suffix": float("inf")}, "suffix is inf"),
        ({"beat_every": 0}, "beat_every is 0"),
        ({"beat_every": 2}, "need beat or beat_before"),
        ({"width": 3, "onset": 1}, "width and offset need periodic"),
        ({"regions": ((4.0, 2.5),)}, "region 4:2.5 ends before it starts"),
        ({"regions": ((-1.0, 2.5),)}, "region -1:2.5"),
        ({"regions": ((float("nan"), 2.5),)}, "region nan:2.5"),
    ],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(InputError, match=words.replace(".", r"\.")):
        Prompt(**options)


def test_spans_must_lie_inside_the_clip():
    Prompt(regions=((0.0, 2.0),), prefix=2.0).check_duration(2.0)
    with pytest.raises(InputError, match="reaches beyond the clip"):
        Prompt(regions=((1.0, 2.5),)).check_duration(2.0)
    with pytest.raises(InputError, match="prefix is 3 s"):
        Prompt(prefix=3.0).check_duration(2.0)


def test_unknown_presets_are_refused_with_the_choice():
    with pytest.raises(InputError, match="small-variation"):
        preset("tiny-variation", PRESETS)


def test_seconds_round_up_to_frames():
    assert frames(10, 44_100 / 768) == 575
    assert frames(3, 44_100 / 768) == 173
    assert frames(0.07, 100) == 7  # 0.07 · 100 is 7.000000000000001


@given(st.data())
def test_regions_never_touch_what_lies_outside(data):
    start = data.draw(st.floats(0, 1.9))
    stop = data.draw(st.floats(start + 0.01, 2.0))
    fields = {"periodic": st.integers(0, 9), "dropout": st.floats(0, 1), "random": st.floats(0, 1)}
    options = {name: data.draw(values) for name, values in fields.items()}
    mask = mask_of(Prompt(regions=((start, stop),), **options))
    inside = masks.regions(SHAPE, [(int(start * RATE), frames(stop, RATE))])
    assert not (mask & ~np.asarray(inside)).any()


def test_prompts_are_hashable_and_made_of_plain_values():
    assert hash(Prompt(regions=((0.0, 1.0),))) == hash(Prompt(regions=((0.0, 1.0),)))
    assert all(not isinstance(v, np.ndarray) for v in dataclasses.asdict(Prompt()).values())
