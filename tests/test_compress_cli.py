"""`vampnet compress` and `vampnet decompress`, from audio to audio."""

import numpy as np
import pytest
import soundfile
from small_codecs import random_codec
from small_models import random_model

import vampnet_jax as vampnet
from vampnet_jax import cli, tokens

RATE = 8000


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("models") / "small"
    vampnet.save(random_model(random_codec()), directory)
    return str(directory)


@pytest.fixture
def clip(tmp_path):
    t = np.arange(int(1.3 * RATE)) / RATE
    left = 0.3 * np.sin(2 * np.pi * 330 * t)
    soundfile.write(tmp_path / "clip.wav", np.stack([left, 0.5 * left], axis=1), RATE)
    return tmp_path / "clip.wav"


def status(*argv) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main([str(word) for word in argv])
    return int(caught.value.code or 0)


@pytest.mark.slow
def test_all_tokens_come_back_and_a_bitrate_is_kept(model, clip, tmp_path, capsys):
    small, back, sound = tmp_path / "a.vnt", tmp_path / "a.npz", tmp_path / "a.wav"
    assert status("compress", clip, small, "--model", model, "--stereo") == 0
    assert status("decompress", small, back, "--model", model) == 0
    assert status("decompress", small, sound, "--model", model) == 0
    loaded = vampnet.load(model)
    from codec_bridge import audio
    from vampnet_jax import pipeline

    wanted = pipeline.encode(loaded, audio.read(clip), stereo=True)
    np.testing.assert_array_equal(tokens.read(back).tokens, wanted.tokens)
    heard, rate = soundfile.read(sound)
    assert (heard.shape, rate) == ((int(1.3 * RATE), 2), RATE)

    assert status("compress", clip, small, "--model", model, "--bitrate", 900) == 2
    assert "exists" in capsys.readouterr().err
    assert status("compress", clip, small, "--model", model, "--bitrate", 900, "--overwrite") == 0
    assert 8 * small.stat().st_size / 1.3 <= 900
    assert status("decompress", small, tmp_path / "b.wav", "--model", model, "--steps", 2) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a.npz", "a.vnt", "a.wav", "b.wav", "clip.wav",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["compress", "CLIP", "OUT.mp3"], "must end in .vnt"),
        (["compress", "nowhere.wav", "OUT.vnt"], "there is no file nowhere.wav"),
        (["compress", "CLIP", "OUT.vnt", "--bitrate", "-3"], "--bitrate is -3"),
        (["compress", "CLIP", "OUT.vnt", "--bitrate", "90", "--keep", "0.1"], "exclude each other"),
        (["compress", "CLIP", "OUT.vnt", "--keep", "1.5"], "--keep is 1.5"),
        (["compress", "CLIP", "OUT.vnt", "--codebooks", "9"], "--codebooks is 9"),
        (["compress", "CLIP", "OUT.vnt", "--period", "256"], "--period is 256"),
        (["compress", "CLIP", "OUT.vnt", "--seed", "-1"], "--seed is -1"),
        (
            ["compress", "CLIP", "OUT.vnt", "--bitrate", "100"],
            "header alone takes 47; give a higher --bitrate",
        ),
        (["decompress", "CLIP", "OUT.wav"], "it is not a .vnt file"),
        (["decompress", "nowhere.vnt", "OUT.wav"], "there is no file nowhere.vnt"),
        (["decompress", "CLIP", "OUT.doc"], "must end in .npz or in one of"),
        (["decompress", "CLIP", "OUT.wav", "--steps", "0"], "--steps is 0"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(model, clip, argv, problem, capsys):
    words = [w.replace("CLIP", str(clip)).replace("OUT", str(clip.parent / "out")) for w in argv]
    assert status(*words, "--model", model) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1
    assert [p.name for p in clip.parent.iterdir()] == ["clip.wav"]


@pytest.mark.parametrize(
    "command", [("compress", "clip.wav", "a.vnt"), ("decompress", "a.vnt", "a.npz"),
                ("evaluate", "music", "-o", "out")],
)  # fmt: skip
def test_device_cpu_is_the_codecs_too(model, clip, tmp_path, monkeypatch, command):
    from codec_bridge.errors import InputError
    from vampnet_jax.compression.compressor import Compressor

    devices = []

    def load(name, *, codec_device="auto"):
        devices.append(codec_device)
        raise InputError("enough seen.")

    monkeypatch.setattr(Compressor, "load", load)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "music").mkdir()
    if command[0] == "decompress":
        (tmp_path / "a.vnt").write_bytes(b"VNT")
    for words in ((), ("--device", "cpu")):
        assert status(*command, "--model", model, *words) == 2
    assert devices == ["auto", "cpu"]
    assert vampnet.load(model, codec_device="cpu").codec.device == "cpu"
