"""The token folder: tokenised tracks in ArrayRecord shards, a manifest and the codec's codebooks.

    manifest.json            format version, codec, tracks and where their records are
    codebooks.safetensors    float32 [C, V, d], the codec's vectors, so that training needs no codec
    tokens-00000.arrayrecord shards; a record is a safetensors blob of up to `RECORD_FRAMES` frames
                             of a track: `tokens` uint16 [frames, C], `loudness` float16 [frames]

Several hosts may write into one folder: host 2 of 4 has `manifest-00002-of-00004.json` and shards
`tokens-00002-of-00004-00000.arrayrecord`, and whoever reads takes the manifests together.

A track's records follow one another in one shard, so an excerpt reads one or two records however
long the track is. The manifest decides what is in the folder: it is replaced in one piece after
the shards that it names are complete, and a shard that it does not name does not count.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from safetensors import SafetensorError

from codec_bridge.atomic import atomic_write
from codec_bridge.errors import InputError

FORMAT_VERSION = 1
RECORD_FRAMES = 2048
MANIFEST = "manifest.json"
CODEBOOKS = "codebooks.safetensors"
SHARD_NAME = re.compile(r"tokens-(\d{5,}-of-\d{5,}-)?\d{5,}\.arrayrecord")
HOST_MANIFEST = re.compile(r"manifest-(\d{5,})-of-(\d{5,})\.json")
SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class CodecInfo:
    """What tokens were made by."""

    fingerprint: str
    """SHA-256 over the codec's tensors."""
    kind: str
    sample_rate: int
    """Hz."""
    hop_length: int
    """Samples per frame."""
    n_codebooks: int
    codebook_size: int

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.sample_rate / self.hop_length

    def frames(self, seconds: float) -> int:
        """Whole frames that cover `seconds`, rounded up (10 s at 57.4 frames/s is 575)."""
        return math.ceil(round(seconds * self.sample_rate / self.hop_length, 6))


@dataclasses.dataclass(frozen=True)
class Track:
    """One tokenised audio file and where its records are."""

    name: str
    """Unique: source, then the path below it without its extension, as `source/album/song`."""
    source: str
    """The top folder that the audio came from."""
    seconds: float
    frames: int
    shard: str
    record: int
    """Its first record in the shard; it has ⌈frames / RECORD_FRAMES⌉ of them."""
    split: str | None
    """`train`, `validation`, `test`, or None: decided when training starts."""
    file_bytes: int
    file_modified: int
    """Size and time (s) of the audio file, which tell whether it changed since."""

    @property
    def records(self) -> range:
        """Its records in its shard."""
        return range(self.record, self.record + -(-self.frames // RECORD_FRAMES))


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What is in a token folder."""

    codec: CodecInfo
    tracks: tuple[Track, ...]

    def to_json(self) -> str:
        """One track a line, so that the file can be read and compared."""
        head = {"format_version": FORMAT_VERSION, "codec": dataclasses.asdict(self.codec)}
        lines = ",\n  ".join(json.dumps(dataclasses.asdict(track)) for track in self.tracks)
        return json.dumps(head, indent=1)[:-2] + f',\n "tracks": [\n  {lines}\n ]\n}}\n'


def host_manifests(folder: Path) -> tuple[dict[int, Path], int]:
    """The manifests of single hosts by the host's number from 1, and how many hosts there are.

    Raises:
      InputError: they are not of one division of the work.
    """
    found: dict[int, Path] = {}
    counts: set[int] = set()
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if match := HOST_MANIFEST.fullmatch(path.name):
            found[int(match[1])] = path
            counts.add(int(match[2]))
    if len(counts) > 1:
        raise InputError(
            f"{folder} has manifests of {' and of '.join(map(str, sorted(counts)))} hosts; delete "
            "those of one division."
        )
    return found, max(counts, default=0)


def read_manifest(folder: Path, *, complete: bool = True) -> Manifest:
    """Read and check `manifest.json` and the manifests of hosts, which are newer.

    Args:
      folder: the token folder.
      complete: refuse a folder that some hosts have not finished.

    Raises:
      InputError: the folder has no manifest, one that this version cannot read, or manifests of
        different codecs; or a host has not finished.
    """
    by_host, n_hosts = host_manifests(folder)
    paths = [folder / MANIFEST] if (folder / MANIFEST).is_file() or not by_host else []
    paths += by_host.values()
    missing = sorted(set(range(1, n_hosts + 1)) - set(by_host))
    if missing and complete:
        raise InputError(
            f"{folder} lacks the tokens of host {missing[0]} of {n_hosts}; run `vampnet tokenize "
            f"AUDIO... {folder} --shard {missing[0]}/{n_hosts}` first."
        )
    manifests = [_read_one(path) for path in paths]
    tracks: dict[str, Track] = {}
    for path, manifest in zip(paths, manifests, strict=True):
        if manifest.codec != manifests[0].codec:
            raise InputError(
                f"{path} has tokens of another codec ({manifest.codec.fingerprint[:12]}…) than "
                f"{paths[0].name} ({manifests[0].codec.fingerprint[:12]}…); tokenise again."
            )
        tracks |= {track.name: track for track in manifest.tracks}
    if complete and not tracks:
        raise InputError(f"{folder} holds no tracks; tokenise some audio.")
    return Manifest(manifests[0].codec, tuple(track for _, track in sorted(tracks.items())))


def _read_one(path: Path) -> Manifest:
    if not path.is_file():
        raise InputError(
            f"{path.parent} is no token folder: it has no {MANIFEST}; make one with "
            f"`vampnet tokenize AUDIO... {path.parent}`."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); tokenise again.") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path} has format version {version}; this version of vampnet reads {FORMAT_VERSION}."
        )
    try:
        codec = _from_json(CodecInfo, content["codec"])
        tracks = tuple(_from_json(Track, track) for track in content["tracks"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}); tokenise again.") from error
    limits = (codec.sample_rate, codec.hop_length, codec.n_codebooks, codec.codebook_size)
    if min(limits) < 1 or codec.codebook_size > np.iinfo(np.uint16).max:
        raise InputError(f"{path} describes an impossible codec: {codec}.")
    for track in tracks:
        if not SHARD_NAME.fullmatch(track.shard) or track.frames < 0 or track.record < 0:
            raise InputError(f"{path} places track {track.name!r} in no possible record.")
    return Manifest(codec, tracks)


def _from_json(kind: type, content: Mapping[str, Any]) -> Any:
    """Build a dataclass whose fields are int, float, str or str | None, checking their types."""
    values = {}
    for field in dataclasses.fields(kind):
        value = content[field.name]
        wanted: Any = (int, float) if field.type is float else field.type
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise TypeError(f"{field.name} is {value!r}")
        values[field.name] = value
    return kind(**values)


def write_manifest(folder: Path, manifest: Manifest, name: str = MANIFEST) -> None:
    """Replace the manifest, or that of one host, in one piece."""
    with atomic_write(folder / name) as path:
        path.write_text(manifest.to_json(), encoding="utf-8")


def write_codebooks(folder: Path, codebooks: np.ndarray, fingerprint: str) -> None:
    """Keep the codec's codebooks `[C, V, d]` beside its tokens."""
    tensors = {"codebooks": np.ascontiguousarray(codebooks, np.float32)}
    blob = safetensors.numpy.save(tensors, metadata={"fingerprint": fingerprint})
    with atomic_write(folder / CODEBOOKS) as path:
        path.write_bytes(blob)


def read_codebooks(folder: Path, codec: CodecInfo) -> np.ndarray:
    """The codebooks float32 `[C, V, d]` that belong to the tokens.

    Raises:
      InputError: missing, damaged, or those of another codec.
    """
    path = folder / CODEBOOKS
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            fingerprint = (file.metadata() or {}).get("fingerprint")
            codebooks = file.get_tensor("codebooks")
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing; tokenise again.") from error
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}); tokenise again.") from error
    if fingerprint != codec.fingerprint:
        raise InputError(
            f"{path} belongs to another codec ({str(fingerprint)[:12]}…) than the tokens "
            f"({codec.fingerprint[:12]}…); tokenise again."
        )
    if codebooks.ndim != 3 or codebooks.shape[:2] != (codec.n_codebooks, codec.codebook_size):
        raise InputError(f"{path} has shape {codebooks.shape}, which does not fit its manifest.")
    return codebooks.astype(np.float32)


def pack_records(tokens: np.ndarray, loudness: np.ndarray) -> list[bytes]:
    """Cut one track into records.

    Args:
      tokens: integers `[C, T]`.
      loudness: LUFS of each frame before normalising, `[T]`.
    """
    tokens = np.ascontiguousarray(tokens.T, np.uint16)
    loudness = loudness.astype(np.float16)
    starts = range(0, len(tokens), RECORD_FRAMES)
    pieces = [slice(start, start + RECORD_FRAMES) for start in starts]
    return [
        safetensors.numpy.save({"tokens": tokens[piece], "loudness": loudness[piece]})
        for piece in pieces
    ]


def write_shard(path: Path, records: Iterable[bytes]) -> int:
    """Write one shard and return how many records it has; it appears when complete."""
    with atomic_write(path) as temporary:
        writer = ArrayRecordWriter(str(temporary), "group_size:1")  # random access by record
        count = 0
        for record in records:
            writer.write(record)
            count += 1
        writer.close()
    return count


class TrackReader:
    """Random access to the frames of a folder's tracks; safe to share between threads."""

    def __init__(self, folder: Path, manifest: Manifest, tracks: Sequence[Track]) -> None:
        self.manifest = manifest
        self.tracks = tracks
        shards = sorted({track.shard for track in tracks})
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing:
            raise InputError(f"{folder / missing[0]} is missing; tokenise again.")
        self._sources = {}
        for name in shards:
            try:
                self._sources[name] = ArrayRecordDataSource(str(folder / name))
            except RuntimeError as error:
                raise InputError(f"{folder / name} is damaged; tokenise again.") from error
        for track in tracks:
            if track.records.stop > len(self._sources[track.shard]):
                raise InputError(
                    f"{folder / track.shard} ends before track {track.name!r}; tokenise again."
                )

    def read(self, index: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Frames `[start, stop)` of one track.

        Returns:
          tokens int32 `[C, stop − start]` and loudness float32 `[stop − start]` in LUFS.

        Raises:
          InputError: a record is damaged, or has token ids that the codec does not have.
        """
        track = self.tracks[index]
        if not 0 <= start < stop <= track.frames:
            raise ValueError(f"frames {start}–{stop} of {track.frames}")
        first, last = start // RECORD_FRAMES, (stop - 1) // RECORD_FRAMES
        source = self._sources[track.shard]
        pieces = [self._unpack(source, track, number) for number in range(first, last + 1)]
        window = slice(start - first * RECORD_FRAMES, stop - first * RECORD_FRAMES)
        tokens = np.concatenate([piece["tokens"] for piece in pieces])[window].T
        loudness = np.concatenate([piece["loudness"] for piece in pieces])[window]
        return tokens.astype(np.int32, order="C"), loudness.astype(np.float32)

    def _unpack(
        self, source: ArrayRecordDataSource, track: Track, number: int
    ) -> dict[str, np.ndarray]:
        try:
            record = safetensors.numpy.load(source[track.record + number])
            tokens, loudness = record["tokens"], record["loudness"]
        except (RuntimeError, SafetensorError, KeyError, IndexError) as error:
            raise InputError(
                f"A record of track {track.name!r} in {track.shard} is damaged; tokenise again."
            ) from error
        codec = self.manifest.codec
        frames = min(RECORD_FRAMES, track.frames - number * RECORD_FRAMES)
        if tokens.shape != (frames, codec.n_codebooks) or loudness.shape != (frames,):
            raise InputError(
                f"A record of track {track.name!r} has tokens {tokens.shape} and loudness "
                f"{loudness.shape}; the manifest says {(frames, codec.n_codebooks)}."
            )
        if tokens.dtype != np.uint16 or tokens.max() >= codec.codebook_size:
            raise InputError(
                f"Track {track.name!r} has token id {tokens.max()}; its codec has ids 0 to "
                f"{codec.codebook_size - 1} only."
            )
        return record
