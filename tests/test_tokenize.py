"""`vampnet tokenize`: audio files to a folder of tokens, resumable and safe to repeat."""

import dataclasses
import functools
import json
import math
import os
from pathlib import Path

import numpy as np
import pyloudnorm
import pytest
import soundfile

import codec_bridge
from codec_bridge import InputError
from vampnet_jax.cli import run as run_command
from vampnet_jax.cli.tokenize import main as tokenize
from vampnet_jax.training import tokenising
from vampnet_jax.training.audio_files import assign_splits, find_audio
from vampnet_jax.training.loudness import excerpt_loudness, frame_loudness
from vampnet_jax.training.tokenising import Outcome, tokenise
from vampnet_jax.training.tokens import TrackReader, read_codebooks, read_manifest

RATE = 8000
CODEC_FILE = Path(__file__).parent / "golden" / "codec.pth"


@dataclasses.dataclass
class Levels:
    """A codec whose token is the loudest sample of a frame; it notes what it encodes."""

    notes: Path
    fingerprint: str = "1" * 64
    fail_after: int = 10**9
    kind: str = "dac"
    sample_rate: int = RATE
    hop_length: int = 80
    n_codebooks: int = 2
    codebook_size: int = 256

    @property
    def codebooks(self) -> np.ndarray:
        return np.arange(2 * 256 * 8, dtype=np.float32).reshape(2, 256, 8)

    def encode(self, audio: np.ndarray) -> np.ndarray:
        with open(self.notes, "a") as notes:
            notes.write(f"{audio.shape[1]}\n")
        if len(self.notes.read_text().split()) > self.fail_after:
            os._exit(9)  # as if killed
        padded = np.pad(np.asarray(audio), ((0, 0), (0, -audio.shape[1] % 80)))
        level = np.abs(padded).reshape(len(padded), -1, 80).max(-1)
        first = np.minimum(level * 255, 255).astype(np.int32)
        return np.stack([first, 255 - first], axis=1)


def tone(path: Path, seconds: float, channels: int = 1) -> Path:
    t = np.arange(round(seconds * RATE)) / RATE
    wave = 0.1 * np.sin(2 * np.pi * 440 * t)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.repeat(wave[:, None], channels, axis=1), RATE)
    return path


def encode(inputs: list[Path], out: Path, notes: Path, **changes) -> Outcome:
    codec = functools.partial(Levels, notes, **changes)
    return tokenise(find_audio(inputs), out, codec, workers=1)


def encoded(notes: Path) -> int:
    return len(notes.read_text().split()) if notes.exists() else 0


@pytest.fixture
def music(tmp_path) -> Path:
    folder = tmp_path / "music"
    tone(folder / "piano" / "one.wav", 2.0)
    tone(folder / "piano" / "deep" / "two.flac", 3.0, channels=2)
    tone(folder / "band" / "three.ogg", 1.0)
    return folder


def test_loudness_of_an_excerpt_from_its_frames_is_that_of_its_audio():
    rng = np.random.default_rng(0)
    swell = np.repeat(10 ** rng.uniform(-3, -0.5, 40), 12_000)  # half a second each
    audio = rng.standard_normal(len(swell)) * swell
    frames = frame_loudness(audio, 24_000, 480)
    assert frames.shape == (1000,)
    for start, stop in ((0, 1000), (100, 600), (730, 880)):
        piece = audio[start * 480 : stop * 480]
        expected = pyloudnorm.Meter(24_000).integrated_loudness(piece)
        assert excerpt_loudness(frames[start:stop], 50.0) == pytest.approx(expected, abs=0.3)
    assert excerpt_loudness(frame_loudness(np.zeros(24_000), 24_000, 480), 50.0) == -math.inf


def test_names_and_sources_come_from_folders(music, tmp_path):
    found = {file.name: file.source for file in find_audio([music])}
    assert found == {"band/three": "band", "piano/deep/two": "piano", "piano/one": "piano"}
    (alone,) = find_audio([music / "band" / "three.ogg"])
    assert (alone.name, alone.source) == ("band/three", "band")
    (flat,) = find_audio([music / "band"])
    assert (flat.name, flat.source) == ("band/three", "band")
    assert len(find_audio([music, music / "band"])) == 3  # the same file twice is one track
    tone(music / "piano" / "one.flac", 1.0)
    with pytest.raises(InputError, match="would both be track 'piano/one'"):
        find_audio([music])
    with pytest.raises(InputError, match="does not exist"):
        find_audio([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no audio"):
        find_audio([tmp_path / "empty"])


def test_tokens_loudness_and_facts_of_every_track_are_there_and_nothing_else(music, tmp_path):
    outcome = encode([music], tmp_path / "tokens", tmp_path / "notes")
    assert (outcome.encoded, outcome.unchanged, outcome.skipped) == (3, 0, {})
    manifest = read_manifest(tmp_path / "tokens")
    assert manifest == outcome.manifest
    assert [(t.name, t.seconds, t.frames) for t in manifest.tracks] == [
        ("band/three", 1.0, 100),
        ("piano/deep/two", 3.0, 300),
        ("piano/one", 2.0, 200),
    ]
    tokens, loudness = TrackReader(tmp_path / "tokens", manifest, manifest.tracks).read(2, 20, 180)
    assert (tokens.sum(0) == 255).all()
    # A sine of gain g is 20 log g − 3 dB and, at −24 LUFS, has this peak; loudness is from before.
    before = frame_loudness(soundfile.read(music / "piano" / "one.wav")[0], RATE, 80)[20:180]
    np.testing.assert_allclose(loudness, before, atol=0.05)
    level = 0.1 * 10 ** ((-24 - excerpt_loudness(before, 100.0)) / 20)
    assert np.median(tokens[0]) == pytest.approx(255 * level, abs=2)
    codebooks = read_codebooks(tmp_path / "tokens", manifest.codec)
    np.testing.assert_array_equal(codebooks, Levels(tmp_path / "notes").codebooks)
    assert {p.name for p in (tmp_path / "tokens").iterdir()} == {
        "manifest.json",
        "codebooks.safetensors",
        "skipped.json",
        "tokens-00000.arrayrecord",
    }


def test_repeating_encodes_only_what_is_new_or_changed(music, tmp_path):
    out, notes = tmp_path / "tokens", tmp_path / "notes"
    encode([music], out, notes)
    again = encode([music], out, notes)
    assert (again.encoded, again.unchanged, encoded(notes)) == (0, 3, 3)
    tone(music / "piano" / "one.wav", 4.0)
    tone(music / "band" / "four.wav", 1.0)
    third = encode([music], out, notes)
    assert (third.encoded, third.unchanged, encoded(notes)) == (2, 2, 5)
    manifest = read_manifest(out)
    seconds = {track.name: track.seconds for track in manifest.tracks}
    assert seconds == {
        "band/four": 1.0, "band/three": 1.0, "piano/deep/two": 3.0, "piano/one": 4.0
    }  # fmt: skip
    for index, track in enumerate(manifest.tracks):
        found, _ = TrackReader(out, manifest, manifest.tracks).read(index, 0, track.frames)
        assert found.shape == (2, track.frames)


def test_a_file_that_changes_while_others_are_encoded_is_encoded_again_next_time(
    music, tmp_path, monkeypatch
):
    out, notes, pack = tmp_path / "tokens", tmp_path / "notes", tokenising._pack

    def after_a_change(*arguments):
        tone(music / "piano" / "one.wav", 5.0)
        return pack(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(tokenising, "_pack", after_a_change)
        encode([music], out, notes)
    again = encode([music], out, notes)
    assert (again.encoded, again.unchanged) == (1, 2)
    assert max(track.seconds for track in read_manifest(out).tracks) == 5.0


def test_a_killed_run_continues_where_it_was(music, tmp_path):
    out, notes = tmp_path / "tokens", tmp_path / "notes"
    with pytest.raises(InputError, match="what was finished is kept"):
        encode([music], out, notes, fail_after=2)
    assert not (out / "manifest.json").exists()
    outcome = encode([music], out, notes)
    assert outcome.encoded == 3
    assert encoded(notes) == 4  # the third was begun twice
    assert not (out / ".parts").exists()


def test_unreadable_files_are_skipped_and_reported(music, tmp_path):
    (music / "piano" / "text.wav").write_text("no audio at all")
    (music / "piano" / "empty.wav").touch()
    soundfile.write(music / "piano" / "silent.wav", np.zeros(RATE), RATE)
    outcome = encode([music], tmp_path / "tokens", tmp_path / "notes")
    assert {Path(path).name for path in outcome.skipped} == {"text.wav", "empty.wav"}
    report = json.loads((tmp_path / "tokens" / "skipped.json").read_text())
    assert report == outcome.skipped
    assert all(report.values())
    names = [track.name for track in outcome.manifest.tracks]
    assert names == ["band/three", "piano/deep/two", "piano/one", "piano/silent"]


def test_nothing_usable_writes_nothing(tmp_path):
    (tmp_path / "music").mkdir()
    (tmp_path / "music" / "text.wav").write_text("no audio at all")
    with pytest.raises(InputError, match="None of the 1 files could be used"):
        encode([tmp_path / "music"], tmp_path / "tokens", tmp_path / "notes")
    assert not (tmp_path / "tokens").exists()


def test_tokens_of_another_codec_and_folders_of_other_things_are_refused(music, tmp_path):
    out, notes = tmp_path / "tokens", tmp_path / "notes"
    encode([music], out, notes)
    before = (out / "manifest.json").read_bytes()
    with pytest.raises(InputError, match="another codec"):
        encode([music], out, notes, fingerprint="2" * 64)
    assert (out / "manifest.json").read_bytes() == before
    with pytest.raises(InputError, match="other files in it"):
        encode([music], music, notes)
    with pytest.raises(InputError, match="is not a folder"):
        encode([music], notes, notes)


def test_splits_come_from_a_file_by_name(music, tmp_path):
    files = find_audio([music])
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": ["piano/one"], "test": ["band/three", "gone/song"]}))
    named, left_out, missing = assign_splits(files, split)
    assert {file.name: file.split for file in named} == {"piano/one": "train", "band/three": "test"}
    assert left_out == ["piano/deep/two"]
    assert missing == ["gone/song"]
    for content, words in (
        ({"train": ["piano/one"], "test": ["piano/one"]}, "twice"),
        ({"holdout": ["piano/one"]}, "'holdout'"),
        ({"train": ["nothing"]}, "names none of the 3 tracks"),
    ):
        split.write_text(json.dumps(content))
        with pytest.raises(InputError, match=words):
            assign_splits(files, split)
    split.write_text("not JSON")
    with pytest.raises(InputError, match="not a JSON of splits"):
        assign_splits(files, split)


def test_the_command_writes_the_tokens_that_the_codec_gives(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")  # paths are not broken at the width of the terminal
    codec = codec_bridge.load(CODEC_FILE)
    song = tmp_path / "song.wav"
    t = np.arange(round(1.5 * codec.sample_rate)) / codec.sample_rate
    soundfile.write(song, 0.3 * np.sin(2 * np.pi * 330 * t * (1 + t)), codec.sample_rate)
    out = tmp_path / "tokens"
    options = ["--codec", str(CODEC_FILE), "--split", "validation", "--workers", "1"]
    assert tokenize([str(song), str(out), *options]) == 0
    assert f"{out}: 1 tracks" in capsys.readouterr().out
    manifest = read_manifest(out)
    assert manifest.codec.fingerprint == codec.fingerprint
    assert manifest.tracks[0].split == "validation"
    normal, _ = codec_bridge.audio.normalise(codec_bridge.audio.read(song))
    expected = np.asarray(codec.encode(normal.samples))[0]
    found, _ = TrackReader(out, manifest, manifest.tracks).read(0, 0, manifest.tracks[0].frames)
    assert found.shape == expected.shape
    assert (found == expected).mean() > 0.99  # ties may fall otherwise with other threads


def test_wrong_options_are_one_sentence(tmp_path, capsys):
    song = tone(tmp_path / "song.wav", 1.0)
    for options, words in (
        ([song], "then the folder to write"),
        ([song, tmp_path / "out", "--workers=0"], "--workers is 0"),
        ([song, tmp_path / "out", "--split=test", "--split-file=x"], "not both"),
        ([song, tmp_path / "out", "--codec=nothing"], "nothing"),
        ([song, tmp_path / "out", "--model=nothing"], "nothing"),
        ([tmp_path / "nowhere.wav", tmp_path / "out"], "nowhere.wav"),
    ):
        with pytest.raises(SystemExit) as stop:
            run_command("tokenize", [str(option) for option in options])
        assert stop.value.code == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
