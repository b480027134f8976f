"""The trainings of `recipes/tiny` as they are run, on a narrow codec and four short tracks."""

import dataclasses
import importlib
import json
import sys

import numpy as np
import pytest
import soundfile
import torch

import codec_bridge

FRAMES = 60
"""Of every track."""


@pytest.fixture
def folder(tmp_path, monkeypatch, tiny_recipe):
    """Music, split, codec, tokens (frame f has token f), variations (odd frames differ)."""
    import codec_loop
    import codec_model
    from small_tokens import write_folder

    from vampnet_jax.training.tokens import CodecInfo

    for name, width in (("encoder_dim", 2), ("latent_dim", 16), ("decoder_dim", 32)):
        monkeypatch.setitem(codec_model.CONFIG, name, width)
    monkeypatch.setattr(codec_loop, "LOG_EVERY", 1)
    torch.manual_seed(0)
    codec_model.export(codec_model.build().state_dict(), tmp_path)
    codec = codec_bridge.load(tmp_path / "codec.safetensors")
    info = CodecInfo(codec.fingerprint, "dac", 24_000, codec_model.HOP, 16, 1024)
    codebooks = np.asarray(codec.codebooks)
    write_folder(tmp_path / "tokens", [FRAMES] * 4, codec=info, codebooks=codebooks)
    names = [f"source{i % 2}/{i}" for i in range(4)]
    frame = np.arange(FRAMES * codec_model.HOP) // codec_model.HOP
    sign = np.where(np.arange(len(frame)) % 2, -1, 1)
    audio = sign * (frame + 1) / 100  # its level tells the frame
    tokens = np.arange(1, 17)[:, None] * np.arange(FRAMES) % 1024
    for i, name in enumerate(names):
        for kind in ("music", "variations"):
            (tmp_path / kind / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / f"music/{name}.wav", audio, 24_000, subtype="FLOAT")
        first = tokens + i * (np.arange(16) == 0)[:, None]
        varied = np.where(np.arange(FRAMES) % 2, 7, first).astype(np.uint16)
        np.save(tmp_path / f"variations/{name}.npy", varied)
    index = {name: {"loudness": -24.0, "seconds": FRAMES / 25} for name in names}
    (tmp_path / "music/index.json").write_text(json.dumps(index))
    (tmp_path / "variations/made_by.json").write_text(json.dumps({"codec": codec.fingerprint}))
    split = {"train": names[2:], "validation": names[:2], "test": []}
    (tmp_path / "split.json").write_text(json.dumps(split))
    return tmp_path


def run(script, folder, monkeypatch, *options, steps=4):
    """Do `steps` steps at a rate that does not depend on how many there are."""
    import codec_loop

    progress = property(lambda training: float(training.step >= steps))
    monkeypatch.setattr(codec_loop.Run, "progress", progress)
    words = ["--music", folder / "music", "--split", folder / "split.json", *options]
    monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
    importlib.import_module(script).main()


def tuning(folder, out="out"):
    """Options of the two that begin with a codec."""
    names = {"codec": "codec.safetensors", "tokens": "tokens", "variations": "variations"}
    names |= {"out": out}
    paths = [word for kind, name in names.items() for word in (f"--{kind}", folder / name)]
    return [*paths, "--frames", 8]


def codec_at(folder):
    return codec_bridge.load(folder / "codec.safetensors").tensors


def changed(before, after):
    """The parts of a codec that differ."""
    return {n.split(".")[0] for n in before if not np.array_equal(before[n], after[n])}


def test_a_codec_trained_in_two_parts_is_that_trained_in_one(folder, monkeypatch, capsys):
    options = ["--batch", 2, "--seconds", 0.4, "--out"]
    run("train_codec", folder, monkeypatch, *options, folder / "parts", steps=2)
    assert "step 2 minute" in capsys.readouterr().out
    first = codec_at(folder / "parts")
    run("train_codec", folder, monkeypatch, *options, folder / "parts", steps=3)
    assert "resumed at step 2" in capsys.readouterr().out
    run("train_codec", folder, monkeypatch, *options, folder / "whole", steps=3)
    whole = codec_at(folder / "whole")
    assert changed(first, whole) == {"encoder", "quantizer", "decoder"}
    assert not changed(codec_at(folder / "parts"), whole)


@pytest.mark.parametrize("adversarial", [0, 0.03])
def test_the_decoders_tuning_changes_nothing_else(folder, monkeypatch, capsys, adversarial):
    run("tune_decoder", folder, monkeypatch, *tuning(folder), "--adversarial", adversarial)
    out = capsys.readouterr().out
    assert all(f"{side} mel" in out for side in ("own", "varied", "jumbled"))
    assert ("own discriminator" in out) == bool(adversarial)
    assert changed(codec_at(folder), codec_at(folder / "out")) == {"decoder"}


def test_the_codecs_tuning_changes_all_of_it_and_resumes(folder, monkeypatch, capsys):
    import tune_codec

    monkeypatch.setattr(tune_codec, "FIT_EXCERPTS", 20)
    run("tune_codec", folder, monkeypatch, *tuning(folder, "parts"), steps=3)
    out = capsys.readouterr().out
    assert all(f"{side} mel" in out for side in ("own", "varied", "jumbled"))
    assert "own same" in out
    assert "codes fitted" in out
    first = codec_at(folder / "parts")
    assert changed(codec_at(folder), first) == {"encoder", "quantizer", "decoder"}
    run("tune_codec", folder, monkeypatch, *tuning(folder, "parts"))
    out = capsys.readouterr().out
    assert "resumed at step 3" in out
    assert "codes fitted" not in out
    run("tune_codec", folder, monkeypatch, *tuning(folder, "whole"))
    assert changed(first, codec_at(folder / "whole")) == {"encoder", "quantizer", "decoder"}
    assert not changed(codec_at(folder / "parts"), codec_at(folder / "whole"))
    capsys.readouterr()
    run("tune_codec", folder, monkeypatch, *tuning(folder, "freely"), "--same", 0)
    assert "own same" not in capsys.readouterr().out


def test_pairs_are_of_the_same_frames_of_the_same_track(folder):
    from codec_data import Pairs
    from codec_model import HOP

    codes = np.asarray(codec_bridge.load(folder / "codec.safetensors").codebooks)
    pairs = Pairs(folder / "music", folder / "tokens", folder / "variations", codes, 20)
    places = set()
    for seed in range(20):
        excerpt = pairs.draw(np.random.default_rng(seed), varied=seed % 2 == 0)
        frames = (excerpt.audio[0, 0].view(-1, HOP).abs().mean(1) * 100).round().long() - 1
        second = excerpt.tokens[0, 1]  # 2f
        kept = excerpt.kept.bool()
        assert torch.equal(second[kept], 2 * frames[kept])
        assert kept.all() or torch.equal(kept, frames % 2 == 0)
        assert kept.all() == (seed % 2 == 1)
        places.add((int(frames[0]), int(excerpt.tokens[0, 0, kept][0] - frames[kept][0])))
    assert {track for _, track in places} == {2, 3}
    assert len(places) > 5


def test_pairs_leave_out_the_variants_of_tracks(folder):
    from codec_data import Pairs

    from vampnet_jax.training.tokens import read_manifest, write_manifest

    manifest = read_manifest(folder / "tokens")
    *others, last = manifest.tracks
    variant = dataclasses.replace(last, name="source0/2~1")  # nothing else is there of it
    write_manifest(folder / "tokens", dataclasses.replace(manifest, tracks=(*others, variant)))
    codes = np.asarray(codec_bridge.load(folder / "codec.safetensors").codebooks)
    pairs = Pairs(folder / "music", folder / "tokens", folder / "variations", codes, 20)
    assert [track.name for track in pairs.tracks] == ["source0/2"]


def test_pairs_refuse_tokens_and_variations_of_another_codec(folder):
    from codec_data import Pairs

    codes = np.asarray(codec_bridge.load(folder / "codec.safetensors").codebooks)
    paths = [folder / name for name in ("music", "tokens", "variations")]
    with pytest.raises(SystemExit, match="tokens was made by another codec"):
        Pairs(*paths, codes + 0.1, 20)
    of_codec = json.loads((folder / "variations/made_by.json").read_text())["codec"]
    (folder / "variations/made_by.json").write_text('{"codec": "another"}')
    with pytest.raises(SystemExit, match="variations was made from tokens of another codec"):
        Pairs(*paths, codes, 20)
    (folder / "variations/source0/2.npy").rename(folder / "kept.npy")
    (folder / "variations/made_by.json").write_text(json.dumps({"codec": of_codec}))
    with pytest.raises(SystemExit, match=r"variations has no source0/2; run vary"):
        Pairs(*paths, codes, 20)
    (folder / "variations/made_by.json").unlink()
    with pytest.raises(SystemExit, match="run vary_training_tracks"):
        Pairs(*paths, codes, 20)


@pytest.mark.parametrize("script", ["tune_decoder", "tune_codec"])
def test_a_run_that_began_from_another_codec_is_not_continued(folder, monkeypatch, script):
    import tune_codec

    monkeypatch.setattr(tune_codec, "FIT_EXCERPTS", 20)
    run("tune_decoder", folder, monkeypatch, *tuning(folder, "other"), steps=1)
    run(script, folder, monkeypatch, *tuning(folder), steps=1)
    checkpoint = folder / "out" / "checkpoint.pt"
    before = checkpoint.read_bytes()
    options = [*tuning(folder), "--codec", folder / "other" / "codec.safetensors"]
    with pytest.raises(SystemExit, match=r"began from another codec; name a new --out"):
        run(script, folder, monkeypatch, *options, steps=2)
    assert checkpoint.read_bytes() == before
