"""Excerpts of a run are a function of the seed and their number, for any number of processes."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from small_tokens import reader, write_folder

from codec_bridge import InputError
from vampnet_jax.training.excerpts import (
    RandomExcerpts,
    choose_tracks,
    examples_of_step,
    fixed_excerpts,
)
from vampnet_jax.training.tokens import RECORD_FRAMES, TrackReader, read_manifest


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tokens"
    write_folder(folder, [60, 60, 200, 5000, 90])
    return folder


def test_reading_any_frames_of_a_track_gives_those_frames_across_records(tokens):
    tracks = reader(tokens)
    start, stop = RECORD_FRAMES - 7, 2 * RECORD_FRAMES + 3
    found, loudness = tracks.read(2, start, stop)  # tracks are in the order of their names
    f = np.arange(start, stop)
    np.testing.assert_array_equal(found, np.stack([f + 3, 2 * f, 3 * f]) % 16)
    assert found.dtype == np.int32
    assert (loudness == -20).all()


def test_example_n_is_the_same_whatever_ran_before_and_however_examples_are_batched(tokens):
    excerpts = RandomExcerpts(reader(tokens), 2, 20, -30.0, seed=3)
    by_four = excerpts.batches(4)
    first = np.concatenate([next(by_four) for _ in range(6)])
    alone = excerpts.batches(1)
    np.testing.assert_array_equal(next(alone)[0], next(excerpts.batches(4))[0])
    by_three = excerpts.batches(3)
    np.testing.assert_array_equal(np.concatenate([next(by_three) for _ in range(8)]), first)
    by_four.set_state({"next_index": 2})
    np.testing.assert_array_equal(next(by_four), first[8:12])
    other = next(RandomExcerpts(reader(tokens), 2, 20, -30.0, seed=4).batches(4))
    assert (other != first[:4]).any()


def test_an_epoch_visits_every_part_of_every_track_once(tokens):
    tracks = reader(tokens)
    excerpts = RandomExcerpts(tracks, 3, 20, -30.0, seed=0)
    assert excerpts.places == (200 + 90 + 5000 - 10) // 20
    seen = [
        excerpts._begin(place, np.random.default_rng(place)) for place in range(excerpts.places)
    ]
    for track, places in enumerate((10, 4, 250)):
        starts = np.array([excerpt.start for excerpt in seen if excerpt.track == track])
        room = tracks.tracks[track].frames - 20
        assert len(starts) == places
        assert starts.min() >= 0
        assert starts.max() <= room
        np.testing.assert_allclose(starts, (np.arange(places) + 0.5) * room / places, atol=21)


def test_one_track_as_long_as_one_window_is_enough(tmp_path):
    write_folder(tmp_path / "tokens", [20], splits=False)
    manifest = read_manifest(tmp_path / "tokens")
    excerpts = RandomExcerpts(
        TrackReader(tmp_path / "tokens", manifest, choose_tracks(manifest, "train")),
        3,
        20,
        -30.0,
        0,
    )
    batches = excerpts.batches(2)
    for _ in range(3):
        assert (next(batches)[:, 0] == np.arange(20) % 16).all()


def test_quiet_excerpts_are_drawn_again_and_silence_ends_after_eight_times(tmp_path, monkeypatch):
    write_folder(tmp_path / "tokens", [400], splits=False, quiet=300)
    manifest = read_manifest(tmp_path / "tokens")
    tracks = TrackReader(tmp_path / "tokens", manifest, manifest.tracks)

    def share_of_loud(min_loudness: float) -> float:
        calls = []
        excerpts = RandomExcerpts(tracks, 1, 10, min_loudness, 0)
        begin = excerpts._begin
        monkeypatch.setattr(excerpts, "_begin", lambda *a: (calls.append(begin(*a)), calls[-1])[1])
        last = [(excerpts.tokens(n), calls[-1].start)[1] for n in range(200)]
        assert len(calls) <= 200 * 9
        return float(np.mean([start >= 291 for start in last]))

    assert share_of_loud(-100.0) == pytest.approx(0.25, abs=0.1)
    assert share_of_loud(-30.0) > 0.85
    assert share_of_loud(0.0) == pytest.approx(0.25, abs=0.1)  # nothing is that loud: last draw


def test_without_splits_one_track_in_twenty_is_held_out_by_its_name(tmp_path):
    write_folder(tmp_path / "tokens", [30], splits=False)
    manifest = read_manifest(tmp_path / "tokens")
    (track,) = manifest.tracks

    def held_out(*names):
        tracks = tuple(dataclasses.replace(track, name=name) for name in names)
        some = dataclasses.replace(manifest, tracks=tracks)
        train, held = ({t.name for t in choose_tracks(some, s)} for s in ("train", "validation"))
        assert train | held == set(names)
        assert not train & held
        return held

    piano, cello = ([f"{name}/{n:03}" for n in range(200)] for name in ("piano", "cello"))
    assert 4 <= len(held_out(*piano)) <= 18
    assert held_out(*piano, *cello) == held_out(*piano) | held_out(*cello)
    few = sorted(set(piano) - held_out(*piano))[:3]  # none of them by its own hash
    assert len(held_out(*few)) == 1
    assert held_out(few[0]) == set()


def test_validation_excerpts_are_spread_over_every_source(tokens):
    excerpts, sources = fixed_excerpts(reader(tokens, "validation"), 3, 20, 7)
    assert excerpts.shape == (7, 3, 20)
    assert set(sources) == {"source0", "source1"}
    again, _ = fixed_excerpts(reader(tokens, "validation"), 3, 20, 7)
    np.testing.assert_array_equal(excerpts, again)


def test_processes_together_read_the_batch_that_one_would_and_their_number_may_change(tokens):
    tracks = reader(tokens)

    def batch(step: int, count: int) -> np.ndarray:
        rows = []
        for index in range(count):
            excerpts = RandomExcerpts(tracks, 2, 20, -30.0, seed=3)
            batches = excerpts.batches(4, process_index=index, process_count=count)
            batches.set_state({"next_index": step})
            rows.append(next(batches))
        assert {len(part) for part in rows} == {4 // count}
        return np.concatenate(rows)

    whole = RandomExcerpts(tracks, 2, 20, -30.0, seed=3).batches(4)
    for step, count in enumerate((1, 2, 4, 2)):
        np.testing.assert_array_equal(batch(step, count), next(whole))


def test_a_process_reads_its_own_rows_only(tokens, monkeypatch):
    tracks = reader(tokens)
    excerpts = RandomExcerpts(tracks, 2, 20, -30.0, seed=3)
    drawn = []
    draw = excerpts._draw
    monkeypatch.setattr(
        excerpts, "_draw", lambda example: (drawn.append(example), draw(example))[1]
    )
    batches = excerpts.batches(4, process_index=1, process_count=2, ahead=1)
    for _ in range(3):
        next(batches)
    assert len(set(drawn)) >= 6  # of three steps at least
    assert set(drawn) <= {example for step in range(8) for example in (4 * step + 2, 4 * step + 3)}
    with pytest.raises(InputError, match="batch_size 4 cannot be divided evenly among 3"):
        excerpts.batches(4, process_index=0, process_count=3)


def test_the_index_function_tells_where_the_excerpts_of_a_step_are(tokens):
    tracks = reader(tokens)
    excerpts = RandomExcerpts(tracks, 2, 20, -30.0, seed=3)
    batches = excerpts.batches(4)
    batches.set_state({"next_index": 7})
    examples = examples_of_step(7, 4)
    assert [*examples_of_step(7, 4, 0, 2), *examples_of_step(7, 4, 1, 2)] == list(examples)
    for example, row in zip(examples, next(batches), strict=True):
        place = excerpts.excerpt(example)
        found, _ = tracks.read(place.track, place.start, place.start + 20)
        np.testing.assert_array_equal(row, found[:2])


def test_weights_decide_how_often_a_source_comes_in_every_stretch(tmp_path):
    write_folder(tmp_path / "tokens", [400, 200, 400], splits=False, quiet=60)
    manifest = read_manifest(tmp_path / "tokens")
    tracks = TrackReader(
        tmp_path / "tokens", manifest, manifest.tracks
    )  # source0: 800, source1: 200

    def sources(**weights: float) -> np.ndarray:
        excerpts = RandomExcerpts(tracks, 1, 20, -30.0, 1, weights)
        chosen = [excerpts.excerpt(n).track for n in range(200)]
        return np.array([tracks.tracks[track].source for track in chosen])

    assert np.mean(sources() == "source1") == pytest.approx(0.2, abs=0.1)
    even = sources(source1=4.0)
    for start in range(0, 200, 20):
        assert np.mean(even[start : start + 20] == "source1") == pytest.approx(0.5, abs=0.05)
    assert set(sources(source1=0.0)) == {"source0"}
    np.testing.assert_array_equal(sources(source1=1.0), sources())


def test_a_weighted_epoch_also_visits_every_place_of_a_source_once(tokens):
    excerpts = RandomExcerpts(reader(tokens), 1, 20, -100.0, 0, {"source1": 0.5})
    of_source0 = {*range(14)}  # its two tracks: 200 and 90 frames
    order = [int(excerpts._order[n]) for n in range(2 * excerpts.places)]
    visits = [place for place in order if place in of_source0]
    assert set(visits[:14]) == set(visits[14:28]) == of_source0
    assert visits[:14] != visits[14:28]


def test_impossible_weights_are_refused(tokens):
    for weights, words in (
        ({"jazz": 2.0}, "no source 'jazz' to weigh; there are: source0, source1"),
        ({"source0": -1.0}, "weight of source 'source0' is -1.0"),
        ({"source0": 0.0, "source1": 0.0}, "Every source has weight 0"),
    ):
        with pytest.raises(InputError, match=words):
            RandomExcerpts(reader(tokens), 1, 20, -30.0, 0, weights)
