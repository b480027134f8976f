"""The trainings of `recipes/tiny` as they are run, on a narrow codec and four short tracks."""

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
    import codec_loop

    progress = property(lambda run: min(1.0, run.step / steps))
    monkeypatch.setattr(codec_loop.Run, "progress", progress)
    words = ["--music", folder / "music", "--split", folder / "split.json", *options]
    monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
    __import__(script).main()


def tuning(folder):
    """Options of the two that begin with a codec."""
    names = {"codec": "codec.safetensors", "tokens": "tokens", "variations": "variations"}
    names |= {"out": "out"}
    paths = [word for kind, name in names.items() for word in (f"--{kind}", folder / name)]
    return [*paths, "--frames", 8]


def codec_at(folder):
    return codec_bridge.load(folder / "codec.safetensors").tensors


def changed(before, after):
    """The parts of a codec that differ."""
    return {n.split(".")[0] for n in before if not np.array_equal(before[n], after[n])}


def test_a_codec_is_trained_from_nothing_and_resumes(folder, monkeypatch, capsys):
    options = ["--out", folder / "out", "--batch", 2, "--seconds", 0.4]
    run("train_codec", folder, monkeypatch, *options, steps=2)
    assert "step 2 minute" in capsys.readouterr().out
    first = codec_at(folder / "out")
    run("train_codec", folder, monkeypatch, *options, steps=3)
    assert "resumed at step 2" in capsys.readouterr().out
    assert changed(first, codec_at(folder / "out")) == {"encoder", "quantizer", "decoder"}


@pytest.mark.parametrize("adversarial", [0, 0.03])
def test_the_decoders_tuning_changes_nothing_else(folder, monkeypatch, capsys, adversarial):
    run("tune_decoder", folder, monkeypatch, *tuning(folder), "--adversarial", adversarial)
    out = capsys.readouterr().out
    assert all(f"{side} mel" in out for side in ("own", "varied", "jumbled"))
    assert ("own discriminator" in out) == bool(adversarial)
    assert changed(codec_at(folder), codec_at(folder / "out")) == {"decoder"}


def test_the_codecs_tuning_changes_all_of_it(folder, monkeypatch, capsys):
    import tune_codec

    monkeypatch.setattr(tune_codec, "FIT_EXCERPTS", 20)
    run("tune_codec", folder, monkeypatch, *tuning(folder))
    out = capsys.readouterr().out
    assert all(f"{side} mel" in out for side in ("own", "varied", "jumbled"))
    assert "own same" in out
    assert out.count("codes fitted") == 2  # before and after
    after = codec_at(folder / "out")
    assert changed(codec_at(folder), after) == {"encoder", "quantizer", "decoder"}
    run("tune_codec", folder, monkeypatch, *tuning(folder), "--same", 0, steps=5)
    out = capsys.readouterr().out
    assert "resumed at step 4" in out
    assert "own same" not in out
    assert "encoder" in changed(after, codec_at(folder / "out"))


def test_pairs_are_of_the_same_frames_of_the_same_track(folder):
    from codec_data import Pairs
    from codec_model import HOP

    codes = np.asarray(codec_bridge.load(folder / "codec.safetensors").codebooks)
    pairs = Pairs(folder / "music", folder / "tokens", folder / "variations", codes, 20)
    starts = set()
    for seed in range(20):
        excerpt = pairs.draw(np.random.default_rng(seed), varied=seed % 2 == 0)
        frames = (excerpt.audio[0, 0].view(-1, HOP).abs().mean(1) * 100).round().long() - 1
        second = excerpt.tokens[0, 1]  # 2f
        kept = excerpt.kept.bool()
        assert torch.equal(second[kept], 2 * frames[kept])
        assert kept.all() or torch.equal(kept, frames % 2 == 0)
        assert kept.all() == (seed % 2 == 1)
        starts.add((int(frames[0]), int(excerpt.tokens[0, 0, kept][0] - frames[kept][0])))
    assert len({track for _, track in starts}) == 2
    assert len(starts) > 5


def test_pairs_refuse_tokens_and_variations_of_another_codec(folder):
    from codec_data import Pairs

    codes = np.asarray(codec_bridge.load(folder / "codec.safetensors").codebooks)
    paths = [folder / name for name in ("music", "tokens", "variations")]
    with pytest.raises(SystemExit, match="tokens was made by another codec"):
        Pairs(*paths, codes + 0.1, 20)
    (folder / "variations/made_by.json").write_text('{"codec": "another"}')
    with pytest.raises(SystemExit, match="variations was made from tokens of another codec"):
        Pairs(*paths, codes, 20)
    (folder / "variations/made_by.json").unlink()
    with pytest.raises(SystemExit, match="run vary_training_tracks"):
        Pairs(*paths, codes, 20)
