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
from small_runs import log, logged, small
from small_tokens import CODEC, reader, write_folder
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import vampnet_jax as vampnet
from codec_bridge import InputError
from vampnet_jax.cli import run as run_command
from vampnet_jax.cli.status import TRY_AGAIN
from vampnet_jax.cli.train import main as train
from vampnet_jax.training.checkpoints import Checkpoints, load_run, read_run
from vampnet_jax.training.log import RunLog
from vampnet_jax.training.tokens import (
    Manifest,
    Track,
    pack_records,
    read_codebooks,
    read_manifest,
    write_codebooks,
    write_manifest,
    write_shard,
)
from vampnet_jax.training.validation import Validation, token_frequencies

SMALL = small("--warmup-steps=2", "--log-every=2")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tokens"
    write_folder(folder, [60, 60, 200, 5000, 90])
    return folder


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


def test_the_unigram_yardstick_scores_token_frequencies_on_the_same_masks(tokens, monkeypatch):
    config = vampnet.ModelConfig(
        n_codebooks=3, n_layers=1, n_heads=1, embedding_dim=8, vocab_size=16
    )
    validation = Validation(reader(tokens, "validation"), config, 20, 8, 4)
    frequencies = token_frequencies(reader(tokens))
    np.testing.assert_allclose(frequencies.sum(1), 1)
    assert frequencies[1][1] < 1e-3 < frequencies[1][2]  # 2f mod 16 is never odd
    uniform = validation.score_unigram(np.full((3, 16), 1 / 16))
    assert uniform["log_loss"] == pytest.approx(math.log(16))
    scores = validation.score_unigram(frequencies)
    assert scores["log_loss"] < math.log(16) - 0.1
    half = validation.ratios >= 0.5
    masked = validation.mask[half]
    likeliest = frequencies.argmax(axis=1)[:, None]  # [C, 1]
    assert scores["top1/r>=0.5"] == pytest.approx(
        (validation.tokens[half] == likeliest)[masked].mean()
    )
    monkeypatch.setattr("vampnet_jax.training.validation.TOP_K", 3)
    drawn = np.random.default_rng(0).dirichlet(np.ones(16), 3)
    three = np.argsort(drawn, axis=1)[:, -3:]
    among = (validation.tokens[half][..., None] == three[:, None]).any(-1)
    assert validation.score_unigram(drawn)["top25/r>=0.5"] == pytest.approx(among[masked].mean())


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
    timed = ("/s", "MFU", "waiting for data", "waiting for checkpoints")
    old, new = (
        [{k: v for k, v in line.items() if not k.endswith(timed)} for line in log(r)]
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
        assert train([str(tokens), "--out", str(run), "--steps=8", *SMALL]) == TRY_AGAIN
    assert signal.getsignal(signal.SIGTERM) is before
    assert Checkpoints(run, keep=2).steps == [3]  # metrics are read one step behind
    assert train(["--out", str(run), "--resume"]) == 0
    jax.tree.map(
        np.testing.assert_array_equal, load_run(whole_run, step=8)[0], load_run(run, step=8)[0]
    )


def test_only_the_newest_checkpoints_and_the_best_are_kept(tokens, tmp_path):
    run = tmp_path / "run"
    options = ["--steps=6", "--validate-every=1", "--keep=1", "--learning-rate=1e-2"]
    assert train([str(tokens), "--out", str(run), *options, *SMALL]) == 0
    losses = logged(run, "validation/log_loss")
    checkpoints = Checkpoints(run, keep=1)
    assert set(checkpoints.steps) == {6, min(losses, key=losses.__getitem__)}
    assert checkpoints.by_loss()[0] == min(losses, key=losses.__getitem__)


def test_a_time_budget_ends_the_run_with_a_checkpoint(tokens, tmp_path):
    run = tmp_path / "run"
    options = ["--minutes=0.05", "--save-every=1", "--validate-every=100000"]
    assert train([str(tokens), "--out", str(run), *options, *SMALL]) == 0
    assert load_run(run)[1].n_codebooks == 2
    assert read_run(run)[0].steps is None
    checkpoints = Checkpoints(run, keep=2, read_only=True)
    assert checkpoints._loss(checkpoints.steps[-1]) < math.inf  # the end is validated
    checkpoints.close()


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_state(tokens, tmp_path):
    run = tmp_path / "run"
    options = ["--steps=50", "--validate-every=1", "--learning-rate=1e15", "--schedule=constant"]
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
    refuses(capsys, [tokens, "--out", whole_run, "--steps=1", "--new"], "already holds a run")
    refuses(capsys, ["--out", whole_run, "--new", "--resume"], "exclude each other")
    refuses(capsys, [tokens, "--out", tmp_path.parent, "--steps=1"], "not empty")
    refuses(capsys, [tokens, *out, "--n-codebooks=4"], "4 codebooks", "have 3")
    refuses(capsys, [tokens, *out, "--window-seconds=900"], "window of 9000 frames")
    refuses(capsys, [tokens, *out, "--n-heads=3"], "--n-heads 3")
    refuses(capsys, ["--out", tmp_path / "run", "--resume"], "no training run")
    refuses(capsys, ["--out", whole_run, "--resume", "--batch-size=9"], "--batch-size 4", "with 9")
    refuses(capsys, out, "folder of tokens")
    refuses(capsys, [tokens, *out, "--codec", "tiny"], "--codec is for listening")
    refuses(capsys, [tokens, *out, "--fine-model", "tiny"], "--fine-model is for listening")
    refuses(capsys, [tokens, *out, "--topology", "v5e:2x2"], "--topology is for --compile-only")
    cudnn = ["--attention=cudnn", "--dtype=bfloat16", "--dropout=0.1"]
    refuses(capsys, [tokens, *out, *cudnn], "--dropout is 0.1, and cuDNN attention has none")
    assert not (tmp_path / "run").exists()


def test_what_is_left_out_of_a_folder_is_said(capsys, tokens, tmp_path):
    folder = tmp_path / "tokens"
    shutil.copytree(tokens, folder)
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    splits = {track["name"]: track for track in content["tracks"]}
    for name, track in splits.items():
        track["split"] = {"source0/0": "validation", "source0/2": "train"}.get(name)
    splits["source1/3"]["split"] = "train"
    path.write_text(json.dumps(content))
    out = ["--out", tmp_path / "run", "--steps=1", *SMALL]
    words = [str(word) for word in (folder, *out, "--window-seconds=15")]
    assert train(words) == 0
    shown = capsys.readouterr().out
    assert "1 validation tracks shorter than 150 frames: left out" in shown
    assert "2 tracks without a split, in a folder that has splits: left out" in shown
    weighed = [folder, *out, "--window-seconds=30", "--source-weight", "source0=2"]
    weighed[2] = tmp_path / "other"
    refuses(capsys, weighed, "'source0' cannot be weighed: none of its training tracks is as long")
    for track in splits.values():
        track["split"] = track["split"] and "validation"
    path.write_text(json.dumps(content))
    refuses(
        capsys,
        [folder, "--out", tmp_path / "third", "--steps=1", *SMALL],
        "has the split train (2 have none)",
    )


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
