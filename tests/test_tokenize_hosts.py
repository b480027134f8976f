"""Several hosts tokenise into one folder; what one of them does never harms the others."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from test_tokenize import Levels, encode, encoded, tone

from codec_bridge import InputError
from vampnet_jax.training.audio_files import find_audio
from vampnet_jax.training.hosts import Host, alone, parse_host
from vampnet_jax.training.tokenising import tokenise
from vampnet_jax.training.tokens import TrackReader, read_manifest

NAMES = [f"band/{i}" for i in range(6)]


class Endless(Levels):
    """Never ends to encode; notes the processes that do."""

    def encode(self, audio: np.ndarray) -> np.ndarray:
        with open(self.notes, "a") as notes:
            notes.write(f"{os.getpid()}\n")
        time.sleep(600)
        raise AssertionError


def as_process(kind: str, music: Path, out: Path, notes: Path, host: str) -> subprocess.Popen:
    """Tokenise in a process of its own; `host` is empty or such as 1/2."""
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_tokenize_hosts import run\n"
        "run(*sys.argv[1:])"
    )
    arguments = [kind, str(music), str(out), str(notes), host]
    return subprocess.Popen([sys.executable, "-c", script, *arguments])


def run(kind: str, music: str, out: str, notes: str, host: str) -> None:
    codec = partial({"levels": Levels, "endless": Endless}[kind], Path(notes))
    share = parse_host(host, {}) if host else None
    tokenise(find_audio([Path(music)]), Path(out), codec, workers=1, host=share)


def tokens_of(folder: Path) -> dict[str, np.ndarray]:
    manifest = read_manifest(folder)
    reader = TrackReader(folder, manifest, manifest.tracks)
    return {
        track.name: reader.read(i, 0, track.frames)[0] for i, track in enumerate(manifest.tracks)
    }


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def music(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("music")
    for i, name in enumerate(NAMES):
        tone(folder / f"{name}.wav", 1.0 + 0.1 * i)
    return folder


def share(music: Path, out: Path, notes: Path, number: int, count: int, **changes):
    codec = partial(Levels, notes, **changes)
    host = Host(number, count)
    return tokenise(find_audio([music]), out, codec, workers=1, host=host)


def test_two_hosts_at_once_make_what_one_would_and_one_takes_it_together(music, tmp_path):
    out, notes = tmp_path / "tokens", tmp_path / "notes"
    processes = [as_process("levels", music, out, notes, host) for host in ("1/2", "2/2")]
    assert [process.wait(300) for process in processes] == [0, 0]
    encode([music], tmp_path / "alone", tmp_path / "other notes")
    together = tokens_of(out)
    assert sorted(together) == NAMES
    for name, tokens in tokens_of(tmp_path / "alone").items():
        np.testing.assert_array_equal(together[name], tokens)
    assert encoded(notes) == len(NAMES)
    hosts = [f"{i:05d}-of-00002" for i in (1, 2)]
    files = {"codebooks.safetensors"} | {f"manifest-{h}.json" for h in hosts}
    files |= {f"skipped-{h}.json" for h in hosts}
    assert names(out) == files | {f"tokens-{h}-00000.arrayrecord" for h in hosts}

    merged = encode([music], out, notes)
    assert (merged.encoded, merged.unchanged, encoded(notes)) == (0, len(NAMES), len(NAMES))
    assert tokens_of(out).keys() == together.keys()
    assert {"manifest.json", "skipped.json"} <= names(out)
    assert not {name for name in names(out) if name.startswith(("manifest-", "skipped-"))}


def test_a_host_may_come_later_repeat_and_find_changes(music, tmp_path):
    out, notes = tmp_path / "tokens", tmp_path / "notes"
    folder = tmp_path / "music"
    for name in NAMES:
        tone(folder / f"{name}.wav", 1.0)
    first = share(folder, out, notes, 1, 2)
    with pytest.raises(InputError, match=r"lacks the tokens of host 2 of 2.*--shard 2/2"):
        read_manifest(out)
    share(folder, out, notes, 2, 2)
    assert sorted(tokens_of(out)) == NAMES
    before = encoded(notes)
    again = share(folder, out, notes, 1, 2)
    assert (again.encoded, again.unchanged) == (0, first.encoded)
    changed = first.manifest.tracks[0].name
    tone(folder / f"{changed}.wav", 2.0)
    outcomes = [share(folder, out, notes, number, 2) for number in (1, 2)]
    assert [outcome.encoded for outcome in outcomes] == [1, 0]
    assert encoded(notes) == before + 1
    assert tokens_of(out)[changed].shape[1] == 200
    with pytest.raises(InputError, match="begun by 2 hosts; repeat with --shard NUMBER/2"):
        share(folder, out, notes, 1, 3)


def test_more_hosts_than_files_and_a_host_without_a_usable_file_are_no_error(tmp_path):
    out, notes = tmp_path / "tokens", tmp_path / "notes"
    tone(tmp_path / "music" / "one.wav", 1.0)
    (tmp_path / "music" / "text.wav").write_text("no audio")
    outcomes = [share(tmp_path / "music", out, notes, number, 3) for number in (1, 2, 3)]
    assert sum(outcome.encoded for outcome in outcomes) == 1
    assert sum(len(outcome.skipped) for outcome in outcomes) == 1
    assert list(tokens_of(out)) == ["music/one"]
    with pytest.raises(InputError, match="another codec"):
        share(tmp_path / "music", out, notes, 1, 3, fingerprint="2" * 64)


def test_workers_of_a_killed_run_end(music, tmp_path):
    notes = tmp_path / "notes"
    process = as_process("endless", music, tmp_path / "tokens", notes, "")
    try:
        wait_until(lambda: notes.exists() and notes.read_text().endswith("\n"), 300)
        worker = int(notes.read_text())
        assert is_running(worker)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    wait_until(lambda: not is_running(worker), 60)


def wait_until(done, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_running(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_two_runs_of_one_share_keep_apart_and_others_do_not_wait(tmp_path):
    parts = tmp_path / "tokens" / ".parts"
    with alone(parts, Host(1, 2)):
        with alone(parts, Host(2, 2)):
            pass
        for host in (Host(1, 2), None):
            with pytest.raises(InputError, match="Another `vampnet tokenize`"), alone(parts, host):
                pass
        assert parts.exists()
    assert not parts.parent.exists()
    with alone(parts, None), pytest.raises(InputError, match="Another"), alone(parts, Host(1, 2)):
        pass
    assert not parts.parent.exists()


def test_a_lock_file_that_its_holder_removes_is_not_the_lock(tmp_path, monkeypatch):
    parts = tmp_path / "tokens" / ".parts"
    flock, removed = fcntl.flock, []

    def flock_after_removal(file, kind):
        if not removed:  # the run before ends between our opening and locking its file
            removed.append(file)
            (parts / "lock").unlink()
            parts.rmdir()
        flock(file, kind)

    monkeypatch.setattr(fcntl, "flock", flock_after_removal)
    with alone(parts, None):
        assert (parts / "lock").exists()
        with pytest.raises(InputError, match="Another"), alone(parts, None):
            pass


def test_a_file_system_without_locks_is_said_and_used(music, tmp_path, monkeypatch):
    def no_locks(file, kind):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match="without locks"):
        outcome = encode([music], tmp_path / "tokens", tmp_path / "notes")
    assert outcome.encoded == len(NAMES)
    assert ".parts" not in names(tmp_path / "tokens")


def test_the_share_is_given_or_the_job_systems():
    assert parse_host("2/4", {}) == Host(2, 4)
    assert parse_host("auto", {"SLURM_PROCID": "0", "SLURM_NTASKS": "3"}) == Host(1, 3)
    pod = {"TPU_WORKER_ID": "2", "TPU_WORKER_HOSTNAMES": "a,b,c,d"}
    assert parse_host("auto", pod) == Host(3, 4)
    for text, words in (
        ("auto", "no job system"),
        ("0/4", "Shard 0/4 is impossible"),
        ("5/4", "Shard 5/4 is impossible"),
        ("one", "such as 1/4"),
    ):
        with pytest.raises(InputError, match=words):
            parse_host(text, {})
    for count in (1, 2, 5):
        owners = [[Host(i + 1, count).has(name) for i in range(count)] for name in NAMES]
        assert (np.sum(owners, axis=1) == 1).all()
