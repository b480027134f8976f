"""Whole runs of `vampnet train` on a small folder of tokens: resuming, refusing, stopping."""

import json
import math
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import vampnet_jax as vampnet
from codec_bridge import InputError
from vampnet_jax.cli import run as run_command
from vampnet_jax.cli.train import main as train
from vampnet_jax.training.checkpoints import Checkpoints, load_run, read_run
from vampnet_jax.training.excerpts import RandomExcerpts, choose_tracks, fixed_excerpts
from vampnet_jax.training.log import RunLog
from vampnet_jax.training.tokens import (
    RECORD_FRAMES,
    CodecInfo,
    Manifest,
    Track,
    TrackReader,
    pack_records,
    read_codebooks,
    read_manifest,
    write_codebooks,
    write_manifest,
    write_shard,
)
from vampnet_jax.training.validation import Validation, token_frequencies

CODEC = CodecInfo("c0dec" * 10, "dac", 100, 10, n_codebooks=3, codebook_size=16)
SMALL = [
    "--n-codebooks=2",
    "--n-layers=1",
    "--n-heads=2",
    "--embedding-dim=16",
    "--window-seconds=2",
    "--batch-size=4",
    "--warmup-steps=2",
    "--log-every=2",
    "--seed=5",
]


def write_folder(folder: Path, lengths: list[int], *, splits: bool = True, quiet: int = 0) -> None:
    """Tokens of frame f of track i are (f + i, 2f, 3f) mod 16; the first `quiet` frames whisper."""
    folder.mkdir(parents=True)
    tracks, records = [], []
    for i, frames in enumerate(lengths):
        f = np.arange(frames)
        loudness = np.where(f < quiet, -60.0, -20.0)
        blobs = pack_records(np.stack([f + i, 2 * f, 3 * f]) % 16, loudness)
        source = f"source{i % 2}"
        split = ("validation" if i < 2 else "train") if splits else None
        tracks.append(
            Track(f"{source}/{i}", source, frames / 10, frames, "tokens-00000.arrayrecord",
                  len(records), split, 0, 0)
        )  # fmt: skip
        records += blobs
    write_shard(folder / "tokens-00000.arrayrecord", records)
    rows = np.random.default_rng(0).standard_normal((3, 16, 8))
    write_codebooks(folder, rows, CODEC.fingerprint)
    write_manifest(folder, Manifest(CODEC, tuple(tracks)))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tokens"
    write_folder(folder, [60, 60, 200, 5000, 90])
    return folder


def reader(folder: Path, split: str = "train") -> TrackReader:
    manifest = read_manifest(folder)
    return TrackReader(folder, manifest, choose_tracks(manifest, split))


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


# --- excerpts


def test_reading_any_frames_of_a_track_gives_those_frames_across_records(tokens):
    tracks = reader(tokens)
    start, stop = RECORD_FRAMES - 7, 2 * RECORD_FRAMES + 3
    found, loudness = tracks.read(1, start, stop)
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
    assert excerpts.places == (200 + 5000 + 90 - 10) // 20
    seen = [
        excerpts._begin(place, np.random.default_rng(place)) for place in range(excerpts.places)
    ]
    for track, places in enumerate((10, 250, 4)):
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


def test_quiet_excerpts_are_drawn_again_and_silence_ends_after_eight_times(tmp_path):
    write_folder(tmp_path / "tokens", [400], splits=False, quiet=300)
    manifest = read_manifest(tmp_path / "tokens")
    tracks = TrackReader(tmp_path / "tokens", manifest, manifest.tracks)

    def share_of_loud(min_loudness: float) -> float:
        calls = []
        excerpts = RandomExcerpts(tracks, 1, 10, min_loudness, 0)
        begin = excerpts._begin
        excerpts._begin = lambda *a: (calls.append(begin(*a)), calls[-1])[1]  # type: ignore
        last = [(excerpts.draw(n, n % excerpts.places), calls[-1].start)[1] for n in range(200)]
        assert len(calls) <= 200 * 9
        return float(np.mean([start >= 291 for start in last]))

    assert share_of_loud(-100.0) == pytest.approx(0.25, abs=0.1)
    assert share_of_loud(-30.0) > 0.85
    assert share_of_loud(0.0) == pytest.approx(0.25, abs=0.1)  # nothing is that loud: last draw


def test_without_splits_one_track_in_twenty_is_held_out_by_its_name(tmp_path):
    write_folder(tmp_path / "tokens", [30] * 40, splits=False)
    manifest = read_manifest(tmp_path / "tokens")
    train_tracks = {track.name for track in choose_tracks(manifest, "train")}
    held_out = {track.name for track in choose_tracks(manifest, "validation")}
    assert len(held_out) == 2
    assert train_tracks | held_out == {track.name for track in manifest.tracks}
    assert not train_tracks & held_out


def test_validation_excerpts_are_spread_over_every_source(tokens):
    excerpts, sources = fixed_excerpts(reader(tokens, "validation"), 3, 20, 7)
    assert excerpts.shape == (7, 3, 20)
    assert set(sources) == {"source0", "source1"}
    again, _ = fixed_excerpts(reader(tokens, "validation"), 3, 20, 7)
    np.testing.assert_array_equal(excerpts, again)


# --- validation


def test_validation_gives_one_number_for_the_same_weights_whatever_the_batch_size(tokens):
    config = vampnet.ModelConfig(
        n_codebooks=3, n_conditioning_codebooks=1, n_layers=1, n_heads=2, embedding_dim=16,
        vocab_size=16,
    )  # fmt: skip
    codebooks = jnp.asarray(read_codebooks(tokens, CODEC))
    params = vampnet.init(jax.random.key(0), config, codebooks)
    scores = [
        Validation(reader(tokens, "validation"), config, 20, 7, size).score(params)
        for size in (3, 7)
    ]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    assert scores[0]["log_loss"] == pytest.approx(math.log(16), abs=0.8)
    assert {"log_loss/source0", "log_loss/source1", "top25/r<0.5"} <= scores[0].keys()


def test_the_unigram_yardstick_is_the_loss_of_token_frequencies_on_the_same_masks(tokens):
    config = vampnet.ModelConfig(
        n_codebooks=3, n_layers=1, n_heads=1, embedding_dim=8, vocab_size=16
    )
    validation = Validation(reader(tokens, "validation"), config, 20, 8, 4)
    frequencies = token_frequencies(reader(tokens))
    np.testing.assert_allclose(frequencies.sum(1), 1)
    assert frequencies[1][1] < 1e-3 < frequencies[1][2]  # 2f mod 16 is never odd
    uniform = validation.score_unigram(np.full((3, 16), 1 / 16))
    assert uniform["log_loss"] == pytest.approx(math.log(16))
    assert validation.score_unigram(frequencies)["log_loss"] < math.log(16) - 0.1


# --- runs


@pytest.fixture(scope="module")
def whole_run(tokens, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert train([str(tokens), "--out", str(run), "--steps=8", "--validate-every=4", *SMALL]) == 0
    return run


def test_a_run_leaves_its_settings_log_checkpoints_and_usable_weights(whole_run, tokens):
    config, facts = read_run(whole_run)
    assert (config.seed, config.steps, config.model.n_codebooks) == (5, 8, 2)
    assert facts["codec"]["fingerprint"] == CODEC.fingerprint
    assert facts["stage"] == "coarse"
    lines = log(whole_run)
    assert [line["step"] for line in lines if "train/loss" in line] == [2, 4, 6, 8]
    assert [line["step"] for line in lines if "validation/log_loss" in line] == [4, 8]
    events = EventAccumulator(str(whole_run / "tensorboard"))
    events.Reload()
    shown = [event.value for event in events.Scalars("train/loss")]
    assert shown == pytest.approx([line["train/loss"] for line in lines if "train/loss" in line])
    params, model = load_run(whole_run)
    np.testing.assert_array_equal(
        params["embedding"]["codebooks"], read_codebooks(tokens, CODEC)[:2]
    )
    assert vampnet.apply(params, jnp.zeros((1, 2, 5), jnp.int32), model).shape == (1, 2, 5, 16)
    score = Validation(reader(tokens, "validation"), model, 20, 64, 4).score(params)
    best = min(line["validation/log_loss"] for line in lines if "validation/log_loss" in line)
    assert score["log_loss"] == pytest.approx(best, rel=1e-6)


def test_a_stopped_and_resumed_run_ends_with_the_weights_of_one_that_never_stopped(
    whole_run, tokens, tmp_path
):
    run = tmp_path / "run"
    # Settings of the whole run, stopped early by a copy of its checkpoint of step 4.
    shutil.copytree(whole_run, run)
    shutil.rmtree(run / "checkpoints" / "8")
    assert train(["--out", str(run), "--resume"]) == 0
    ends = [load_run(folder, step=8)[0] for folder in (whole_run, run)]
    jax.tree.map(np.testing.assert_array_equal, *ends)
    old, new = (
        [{k: v for k, v in line.items() if "/s" not in k and "waiting" not in k} for line in log(r)]
        for r in (whole_run, run)
    )
    assert [line for line in new if line["step"] == 8] == [
        line for line in old if line["step"] == 8
    ]
    assert [line["step"] for line in new if "train/loss" in line] == [2, 4, 6, 8]


def test_sigterm_saves_and_stops_and_the_run_can_be_resumed(
    whole_run, tokens, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    show = RunLog.show

    def show_and_be_told_to_stop(self, step, metrics, done):
        show(self, step, metrics, done)
        signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "show", show_and_be_told_to_stop)
        assert train([str(tokens), "--out", str(run), "--steps=8", *SMALL]) == 130
    assert signal.getsignal(signal.SIGTERM) is before
    assert Checkpoints(run, keep=2).steps == [2]
    assert train(["--out", str(run), "--resume"]) == 0
    jax.tree.map(
        np.testing.assert_array_equal, load_run(whole_run, step=8)[0], load_run(run, step=8)[0]
    )


def test_only_the_newest_checkpoints_and_the_best_are_kept(tokens, tmp_path):
    run = tmp_path / "run"
    options = ["--steps=6", "--validate-every=1", "--keep=1", "--learning-rate=1e-2"]
    assert train([str(tokens), "--out", str(run), *options, *SMALL]) == 0
    losses = {
        line["step"]: line["validation/log_loss"]
        for line in log(run)
        if "validation/log_loss" in line
    }
    checkpoints = Checkpoints(run, keep=1)
    assert set(checkpoints.steps) == {6, min(losses, key=losses.__getitem__)}
    assert checkpoints.best() == min(losses, key=losses.__getitem__)


def test_a_time_budget_ends_the_run_with_a_checkpoint(tokens, tmp_path):
    run = tmp_path / "run"
    assert train([str(tokens), "--out", str(run), "--minutes=0.05", *SMALL]) == 0
    assert load_run(run)[1].n_codebooks == 2
    assert read_run(run)[0].steps is None


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_state(tokens, tmp_path):
    run = tmp_path / "run"
    options = ["--steps=50", "--validate-every=1", "--learning-rate=1e30", "--schedule=constant"]
    with pytest.raises(InputError, match=r"not a finite number at step \d+; the last good state"):
        train([str(tokens), "--out", str(run), *options, *SMALL])
    params, _ = load_run(run)
    assert np.isfinite(params["head"]["kernel"]).all()


def refuses(capsys, arguments: list[str], *words: str) -> None:
    with pytest.raises(SystemExit) as stop:
        run_command("train", [str(argument) for argument in arguments])
    message = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert message[-1].startswith("error: ")
    for word in words:
        assert word in message[-1]


def test_wrong_input_is_one_sentence_and_writes_nothing(capsys, tokens, whole_run, tmp_path):
    out = ["--out", tmp_path / "run", "--steps=1", *SMALL]
    refuses(capsys, [tmp_path, *out], "no token folder", "vampnet tokenize")
    refuses(capsys, [tokens, "--out", whole_run, "--steps=1"], "--resume")
    refuses(capsys, [tokens, "--out", tmp_path.parent, "--steps=1"], "not empty")
    refuses(capsys, [tokens, *out, "--n-codebooks=4"], "4 codebooks", "have 3")
    refuses(capsys, [tokens, *out, "--window-seconds=900"], "window of 9000 frames")
    refuses(capsys, [tokens, *out, "--n-heads=3"], "n_heads 3")
    refuses(capsys, ["--out", tmp_path / "run", "--resume"], "no training run")
    refuses(capsys, ["--out", whole_run, "--resume", "--batch-size=9"], "batch_size 4", "to 9")
    refuses(capsys, out, "folder of tokens")
    assert not (tmp_path / "run").exists()


def test_damaged_or_foreign_token_folders_are_refused(capsys, tokens, whole_run, tmp_path):
    def folder(name: str) -> Path:
        shutil.copytree(tokens, tmp_path / name)
        return tmp_path / name

    def run(data: Path, *words: str) -> None:
        refuses(capsys, [data, "--out", tmp_path / f"{data.name}-run", "--steps=1", *SMALL], *words)

    newer = folder("newer")
    manifest = newer / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 9'))
    run(newer, "version 9")
    outside = folder("outside")
    manifest = outside / "manifest.json"
    manifest.write_text(manifest.read_text().replace("tokens-00000", "../tokens-00000"))
    run(outside, "no possible record")
    cut = folder("cut")
    shard = cut / "tokens-00000.arrayrecord"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    run(cut, "damaged")
    missing = folder("missing")
    (missing / "tokens-00000.arrayrecord").unlink()
    run(missing, "missing")
    other = folder("other")
    write_codebooks(other, np.zeros((3, 16, 8)), "another")
    run(other, "another codec")
    changed = folder("changed")
    content = json.loads((changed / "manifest.json").read_text())
    content["codec"]["fingerprint"] = "another"
    (changed / "manifest.json").write_text(json.dumps(content))
    refuses(capsys, [changed, "--out", whole_run, "--resume"], "another codec")
    huge = folder("huge")
    records = pack_records(np.full((3, 60), 16), np.full(60, -20.0))
    write_shard(huge / "tokens-00000.arrayrecord", records)
    tracks = read_manifest(tokens).tracks[:1]
    write_manifest(huge, Manifest(CODEC, (Track(**{**vars(tracks[0]), "split": "train"}),)))
    run(huge, "token id 16")
