"""What a person sees of a run: rates, where time goes, sounds and pictures."""

import dataclasses
import functools
import json
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from rich.console import Console
from small_models import random_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import codec_bridge
import vampnet_jax as vampnet
from codec_bridge import InputError
from vampnet_jax.cli.train import main as train
from vampnet_jax.config import ModelConfig
from vampnet_jax.training import flops
from vampnet_jax.training.config import TrainConfig
from vampnet_jax.training.log import RunLog
from vampnet_jax.training.meter import Meter
from vampnet_jax.training.step import init_state, train_step
from vampnet_jax.training.tokens import (
    CodecInfo,
    Manifest,
    Track,
    pack_records,
    write_codebooks,
    write_manifest,
    write_shard,
)


def shown(run: Path) -> EventAccumulator:
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0, "audio": 0})
    events.Reload()
    return events


def test_a_report_says_how_fast_it_went_and_what_was_waited_for(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def pass_time(seconds: float) -> None:
        now[0] += seconds

    meter = Meter(tokens_per_step=50, flops_per_step=3e9, peak_flops=6e9)
    for loss in (1.0, 2.0, float("nan"), 3.0):
        with meter.waiting("data"):
            pass_time(0.5)
        pass_time(1.0)
        meter.add({"loss": loss, "top1": float("nan")})
    with meter.waiting("checkpoints"):
        pass_time(2.0)
    with meter.paused():
        pass_time(100.0)
    report = meter.report()
    assert math.isnan(report.pop("top1"))
    assert report == pytest.approx(
        {
            "loss": 2.0,
            "steps/s": 4 / 8,
            "tokens/s": 200 / 8,
            "MFU": 4 * 3 / 8 / 6,
            "waiting for data": 2 / 8,
            "waiting for checkpoints": 2 / 8,
        }
    )
    pass_time(1.0)
    assert meter.report()["steps/s"] == 0
    with meter.waiting("data"):
        pass_time(60.0)  # compiling
    meter.restart()
    pass_time(2.0)
    meter.add({"loss": 1.0})
    report = meter.report()
    assert (report["steps/s"], report["waiting for data"]) == (0.5, 0)


def test_the_formula_for_flops_agrees_with_what_xla_counts():
    model = ModelConfig(
        n_codebooks=3, n_conditioning_codebooks=1, n_layers=1, n_heads=4, embedding_dim=256,
        vocab_size=256, dropout=0.0,
    )  # fmt: skip
    config = TrainConfig(model, steps=1, batch_size=2)
    state = jax.eval_shape(
        functools.partial(init_state, config), jax.ShapeDtypeStruct((3, 256, 8), jnp.float32)
    )
    tokens = jax.ShapeDtypeStruct((2, 3, 128), jnp.int32)
    done = jax.ShapeDtypeStruct((), jnp.float32)
    counted = (
        jax.jit(functools.partial(train_step, config=config))
        .lower(state, tokens, done)
        .cost_analysis()["flops"]
    )
    assert flops.step_flops(config, 128) == pytest.approx(counted, rel=0.05)


def test_utilisation_is_of_the_chips_sheet_or_of_a_measured_rate_and_says_which(monkeypatch):
    model = ModelConfig(n_codebooks=2, n_layers=1, n_heads=2, embedding_dim=16, vocab_size=16)
    config = TrainConfig(model, steps=1)
    measured = flops.peak(config, 1)
    assert measured.flops > 1e8
    assert "measured at start: float32" in measured.source

    class Chip:
        device_kind, platform = "TPU v5 lite", "tpu"

    monkeypatch.setattr(jax, "local_devices", lambda: [Chip()])
    known = flops.peak(config, 8)  # of the mesh, which may be smaller than the machine
    assert known.flops == 8 * 197e12
    assert known.source == "8 × 197 TFLOP/s (TPU v5 lite, data sheet)"


def test_only_one_process_shows_and_keeps_anything(tmp_path, capsys):
    with RunLog(tmp_path, Console(), 0, quiet=True) as log:
        log.write(1, {"train/loss": 1.0})
        log.say("hello")
        log.write_text("configuration", "x")
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


def test_after_a_restart_the_log_has_every_step_once(tmp_path):
    for first_step, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        with RunLog(tmp_path, Console(quiet=True), first_step) as log:
            for step in steps:
                log.write(step, {"train/loss": float(10 * first_step + step)})
        time.sleep(1.1)  # TensorBoard orders its files by their second
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["train/loss"] for line in lines] == [1, 2, 23, 24]
    assert [event.value for event in shown(tmp_path).Scalars("train/loss")] == [1, 2, 23, 24]


# --- sounds and pictures


@pytest.fixture(scope="module")
def tokens(tmp_path_factory, small_codec) -> Path:
    """Tokens of the small codec, 125 frames a second."""
    folder = tmp_path_factory.mktemp("data") / "tokens"
    folder.mkdir()
    codec = CodecInfo(small_codec.fingerprint, "dac", 8000, 64, 8, 64)
    rng = np.random.default_rng(0)
    tracks, records = [], []
    for i in range(3):
        blobs = pack_records(rng.integers(0, 64, (8, 200)), np.full(200, -20.0))
        split = "train" if i else "validation"
        tracks.append(
            Track(f"s/{i}", "s", 1.6, 200, "tokens-00000.arrayrecord", len(records), split, 0, 0)
        )
        records += blobs
    write_shard(folder / "tokens-00000.arrayrecord", records)
    write_codebooks(folder, np.asarray(small_codec.codebooks), codec.fingerprint)
    write_manifest(folder, Manifest(codec, tuple(tracks)))
    codec_bridge.save(small_codec, folder.parent / "codec.safetensors")
    return folder


SIZES = ["--n-layers=1", "--n-heads=2", "--embedding-dim=16", "--window-seconds=0.4"]
SIZES += ["--batch-size=2", "--seed=1", "--warmup-steps=1"]


def test_a_coarse_run_can_be_heard_through_a_fine_model(tokens, tmp_path, small_codec):
    model, run = tmp_path / "model", tmp_path / "run"
    vampnet.save(random_model(small_codec), model)
    command = [str(tokens), "--out", str(run), "--n-codebooks=2", "--steps=2", *SIZES]
    command += ["--listen-every=1", f"--codec={model}", f"--fine-model={model}"]
    assert train(command) == 0
    events = shown(run)
    names = [f"{name}/{n}" for name in ("inpainting", "periodic", "from nothing") for n in (1, 2)]
    assert set(events.Tags()["audio"]) == {*names, "reconstruction/1", "reconstruction/2"}
    assert set(events.Tags()["images"]) == set(names)
    assert [event.step for event in events.Audio("periodic/1")] == [1, 2]
    assert len(events.Audio("reconstruction/1")) == 1
    sound = tmp_path / "sound.wav"
    sound.write_bytes(events.Audio("inpainting/1")[0].encoded_audio_string)
    audio, rate = soundfile.read(sound)
    assert rate == 8000
    assert len(audio) == 50 * 64  # 0.4 s of frames
    assert np.abs(audio).max() > 0
    assert events.Images("inpainting/1")[0].width == 1200
    settings = events.Tensors("configuration")[0].tensor_proto.string_val[0].decode()
    assert '"listen_every": 1' in settings


def test_the_sounds_of_the_same_weights_are_the_same(tokens, tmp_path, small_codec):
    sounds = []
    for name in ("one", "two"):
        run = tmp_path / name
        command = [str(tokens), "--out", str(run), "--n-codebooks=2", "--steps=1", *SIZES]
        command += ["--listen-every=1", f"--codec={tokens.parent / 'codec.safetensors'}"]
        assert train(command) == 0
        sounds.append(shown(run).Audio("from nothing/1")[0].encoded_audio_string)
    assert sounds[0] == sounds[1]


def test_listening_without_the_right_codec_or_model_is_refused_before_training(
    tokens, tmp_path, small_codec
):
    out = tmp_path / "run"
    command = [str(tokens), "--out", str(out), "--n-codebooks=2", "--steps=1", *SIZES]
    with pytest.raises(InputError, match="--listen-every needs the codec that made the tokens"):
        train([*command, "--listen-every=1"])
    assert not out.exists()
    with pytest.raises(InputError, match="tiny is not the codec that made the tokens"):
        train([*command, "--listen-every=1", "--codec=tiny"])
    model = random_model(small_codec)
    embedding = model.fine.params["embedding"]
    strange = embedding | {"codebooks": embedding["codebooks"][::-1]}
    fine = model.fine._replace(params=model.fine.params | {"embedding": strange})
    vampnet.save(dataclasses.replace(model, fine=fine), tmp_path / "strange")
    codec = f"--codec={tokens.parent / 'codec.safetensors'}"
    with pytest.raises(InputError, match="strange speaks the tokens of another codec"):
        train([*command, "--listen-every=1", codec, f"--fine-model={tmp_path / 'strange'}"])
