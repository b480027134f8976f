"""Audio files to a token folder: in parallel, on several hosts, resumable, safe to repeat.

Every finished track is kept at once, as a file of its records in the hidden folder `.parts`; when
all are done they are packed into shards and the manifest is replaced. So a run that was stopped
anywhere loses at most the tracks that were being encoded, and a run that is repeated does
only what is new or changed.

Hosts that share the folder divide the files by a hash of their names and write shards and
manifests of their own; a run on one host takes these together.
"""

import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
import safetensors.numpy

from codec_bridge import audio
from codec_bridge.atomic import atomic_write
from codec_bridge.errors import InputError
from vampnet_jax.training.audio_files import AudioFile
from vampnet_jax.training.hosts import Host, alone
from vampnet_jax.training.loudness import frame_loudness
from vampnet_jax.training.tokens import (
    CODEBOOKS,
    HOST_MANIFEST,
    MANIFEST,
    SHARD_NAME,
    CodecInfo,
    Manifest,
    Track,
    host_manifests,
    pack_records,
    read_manifest,
    write_codebooks,
    write_manifest,
    write_shard,
)

Read = Callable[[Path], audio.Audio]
SHARD_BYTES = 256 * 2**20
PARTS = ".parts"
REPORT = "skipped.json"
HOST_REPORT = re.compile(r"skipped-\d{5,}-of-\d{5,}\.json")


class Encoder(Protocol):
    """What tokenising needs of a codec."""

    @property
    def kind(self) -> str: ...
    @property
    def sample_rate(self) -> int: ...
    @property
    def hop_length(self) -> int: ...
    @property
    def n_codebooks(self) -> int: ...
    @property
    def codebook_size(self) -> int: ...
    @property
    def codebooks(self) -> np.ndarray: ...
    @property
    def fingerprint(self) -> str: ...

    def encode(self, audio: Any) -> Any:
        """float32 `[B, samples]` → int32 `[B, C, T]`."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run did."""

    encoded: int
    unchanged: int
    skipped: Mapping[str, str]
    """Path → why, of files that could not be used."""
    manifest: Manifest
    """Of the folder, or of one host's share of it."""


def describe(codec: Encoder) -> CodecInfo:
    """What a manifest says about a codec."""
    names = [field.name for field in dataclasses.fields(CodecInfo)]
    return CodecInfo(**{name: getattr(codec, name) for name in names})


@dataclasses.dataclass(frozen=True)
class EncodedTrack:
    """One file's tokens `[C, T]`, loudness by frame (before normalising, LUFS) and seconds."""

    tokens: np.ndarray
    loudness: np.ndarray
    seconds: float


def encode_track(file: AudioFile, codec: Encoder, read: Read) -> EncodedTrack:
    """Read, resample, mix to mono, normalise and encode one file."""
    recording = read(file.path)
    mono = audio.resample(audio.mono(recording), codec.sample_rate)
    loudness = frame_loudness(mono.samples[0], codec.sample_rate, codec.hop_length)
    normal, _ = audio.normalise(mono)  # to −24 LUFS
    tokens = np.asarray(codec.encode(normal.samples))[0]
    frames = min(tokens.shape[1], len(loudness))
    seconds = recording.samples.shape[1] / recording.rate
    return EncodedTrack(tokens[:, :frames], loudness[:frames], seconds)


def tokenise(
    files: Sequence[AudioFile],
    out: Path,
    load_codec: Callable[[], Encoder],
    *,
    workers: int,
    host: Host | None = None,
    read: Read = audio.read,
    report: Callable[[int, int], object] = lambda done, total: None,
) -> Outcome:
    """Tokenise files into the token folder `out`, which may already hold tracks.

    Args:
      files: what to tokenise, the same for all hosts; tracks of the same name that have not
        changed are left alone.
      out: made if missing.
      load_codec: gives the codec; called here and in every worker process, so picklable.
      workers: processes.
      host: tokenise the share of one of several hosts; they may run at once.
      read: path → audio, picklable; files that are no usual audio files can be read so.
      report: hears how many files of how many are done.

    Raises:
      InputError: `out` holds tokens of another codec or cannot be written, or no file could be
        used.
    """
    codec = load_codec()
    info = describe(codec)
    manifest = _existing(out, info, host)
    if host is not None:
        files = [file for file in files if host.has(file.name)]
    parts = out / PARTS
    with alone(parts, host):
        manifest = _existing(out, info, host)  # another run may just have ended
        codebooks = np.asarray(codec.codebooks)
        del codec
        known = {track.name: track for track in manifest.tracks}
        changed = [f for f in files if not _is_known(f, known.get(f.name))]
        places = [(file, _part(out, file, info)) for file in changed]
        own = {part.stem for _, part in places}
        for unfinished in parts.glob(".*"):  # of a run that was killed
            if host is None or unfinished.name.split(".")[1] in own:
                unfinished.unlink()
        todo = [(file, part) for file, part in places if not part.exists()]
        counter = itertools.count(len(files) - len(todo))
        report(next(counter), len(files))
        skipped: dict[str, str] = {}
        if todo:
            skipped = _encode_all(
                todo, load_codec, read, workers, lambda: report(next(counter), len(files))
            )
        ready = [(file, part) for file, part in places if part.exists()]
        fresh = _pack(out, ready, host)
        splits = {file.name: file.split for file in files if file.split}
        tracks = {track.name: track for track in [*manifest.tracks, *fresh]}
        if host is not None:
            tracks = {name: track for name, track in tracks.items() if host.has(name)}
        elif not tracks:
            first, problem = next(iter(skipped.items()))
            raise InputError(f"None of the {len(files)} files could be used; {first}: {problem}")
        manifest = Manifest(
            info,
            tuple(
                dataclasses.replace(track, split=splits.get(name, track.split))
                for name, track in sorted(tracks.items())
            ),
        )
        write_codebooks(out, codebooks, info.fingerprint)
        write_manifest(out, manifest, MANIFEST if host is None else f"manifest-{host.label}.json")
        with atomic_write(out / (REPORT if host is None else f"skipped-{host.label}.json")) as path:
            path.write_text(json.dumps(skipped, indent=1) + "\n", encoding="utf-8")
        for _, part in ready:
            part.unlink()
        if host is None:
            _remove_unnamed(out, manifest)
    return Outcome(len(fresh), len(files) - len(changed), skipped, manifest)


def _remove_unnamed(out: Path, manifest: Manifest) -> None:
    """Files that the folder's manifest replaces: of hosts, of changed tracks, of a killed run."""
    named = {track.shard for track in manifest.tracks}
    for path in out.iterdir():
        old_shard = _is_shard(path) and path.name not in named
        if old_shard or HOST_MANIFEST.fullmatch(path.name) or HOST_REPORT.fullmatch(path.name):
            path.unlink()


def _existing(out: Path, info: CodecInfo, host: Host | None) -> Manifest:
    """What the folder holds, of all hosts."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is not a folder.")
    by_host, count = host_manifests(out)
    if host is not None and by_host and host.count != count:
        raise InputError(
            f"{out} was begun by {count} hosts; repeat with --shard NUMBER/{count}, or once "
            "without --shard, which takes their work together."
        )
    if not (by_host or (out / MANIFEST).exists()):
        if out.exists() and any(not p.name.startswith(".") for p in _strangers(out)):
            raise InputError(f"{out} has other files in it; choose a new or empty folder.")
        return Manifest(info, ())
    manifest = read_manifest(out, complete=False)
    if manifest.codec != info:
        raise InputError(
            f"{out} holds tokens of another codec ({manifest.codec.fingerprint[:12]}…) than the "
            f"one given ({info.fingerprint[:12]}…); choose another folder."
        )
    return manifest


def _strangers(out: Path) -> Iterator[Path]:
    ours = (SHARD_NAME, HOST_REPORT, re.compile(re.escape(CODEBOOKS)))
    return (p for p in out.iterdir() if not any(name.fullmatch(p.name) for name in ours))


def _is_known(file: AudioFile, track: Track | None) -> bool:
    return track is not None and (track.file_bytes, track.file_modified) == file.stamp


def _part(out: Path, file: AudioFile, info: CodecInfo) -> Path:
    identity = json.dumps([file.name, *file.stamp, info.fingerprint])
    return out / PARTS / (hashlib.sha256(identity.encode()).hexdigest()[:32] + ".safetensors")


def _encode_all(
    todo: Sequence[tuple[AudioFile, Path]],
    load_codec: Callable[[], Encoder],
    read: Read,
    workers: int,
    report: Callable[[], object],
) -> dict[str, str]:
    """Write the part of every file; returns why some could not be."""
    skipped: dict[str, str] = {}
    todo = sorted(todo, key=lambda pair: -pair[0].stamp[0])  # no long one left for the end
    workers = min(workers, len(todo))
    threads = max(1, (os.cpu_count() or 1) // max(workers, 1))
    context = multiprocessing.get_context("spawn")  # a fork of a process that runs JAX may hang
    arguments = (load_codec, read, threads)
    pool = ProcessPoolExecutor(max(workers, 1), context, _start_worker, arguments)
    try:
        jobs = {pool.submit(_encode_part, file, part): file for file, part in todo}
        for job in as_completed(jobs):
            problem = job.result()
            if problem:
                skipped[str(jobs[job].path)] = problem
            report()
    except BrokenProcessPool as error:
        raise InputError(
            "A worker process died, perhaps for lack of memory; what was finished is kept: repeat "
            "the command, with fewer workers."
        ) from error
    except BaseException:  # Ctrl-C: do not wait for the tracks being encoded
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return skipped


def _start_worker(load_codec: Callable[[], Encoder], read: Read, threads: int) -> None:
    """Load the codec of this process; PyTorch reads the number of threads when imported."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    os.environ["OMP_WAIT_POLICY"] = "passive"  # waiting threads leave the core to other workers
    jax.config.update("jax_platforms", "cpu")
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = (load_codec(), read)


def _end_with_parent() -> None:
    """A killed parent cannot stop its workers, so they watch it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


_worker: tuple[Encoder, Read] | None = None


def _encode_part(file: AudioFile, part: Path) -> str | None:
    """Encode one file in a worker process; returns the problem if there is one."""
    assert _worker is not None
    codec, read = _worker
    try:
        track = encode_track(file, codec, read)
    except Exception as error:  # one odd file must not end the run
        return str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
    tensors: dict[str, np.ndarray] = {
        "tokens": np.ascontiguousarray(track.tokens, np.uint16),
        "loudness": track.loudness.astype(np.float16),
        "seconds": np.array([track.seconds], np.float64),
    }
    with atomic_write(part) as path:
        path.write_bytes(safetensors.numpy.save(tensors))
    return None


def _pack(out: Path, ready: Sequence[tuple[AudioFile, Path]], host: Host | None) -> list[Track]:
    """Write the parts into new shards."""
    prefix = "tokens" if host is None else f"tokens-{host.label}"
    found = [path.stem.rpartition("-") for path in out.iterdir() if _is_shard(path)]
    number = max((int(last) for first, _, last in found if first == prefix), default=-1) + 1
    fresh: list[Track] = []
    waiting = list(ready)
    while waiting:
        name = f"{prefix}-{number:05d}.arrayrecord"
        placed: list[Track] = []

        def records(name: str = name, placed: list[Track] = placed) -> Iterator[bytes]:
            size = count = 0
            while waiting and size < SHARD_BYTES:
                file, part = waiting.pop(0)
                track, blobs = _placed(file, part, name, count)
                placed.append(track)
                yield from blobs
                count += len(blobs)
                size += sum(map(len, blobs))

        write_shard(out / name, records())
        fresh += placed
        number += 1
    return fresh


def _placed(file: AudioFile, part: Path, shard: str, record: int) -> tuple[Track, list[bytes]]:
    tensors = safetensors.numpy.load_file(part)
    file_bytes, file_modified = file.stamp
    track = Track(
        name=file.name,
        source=file.source,
        seconds=round(float(tensors["seconds"][0]), 3),
        frames=tensors["tokens"].shape[1],
        shard=shard,
        record=record,
        split=file.split,
        file_bytes=file_bytes,
        file_modified=file_modified,
    )
    return track, pack_records(tensors["tokens"], tensors["loudness"])


def _is_shard(path: Path) -> bool:
    return SHARD_NAME.fullmatch(path.name) is not None
