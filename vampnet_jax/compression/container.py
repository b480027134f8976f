"""The `.vnt` container: a header of 47 bytes and a payload, packed and parsed with every limit.

Little-endian:

    0   3  "VNT"                        24  4  seed of what is generated
    3   1  format version               28  4  samples, at the codec's rate
    4   1  probabilities (0, 1, 2)      32  3  frames
    5   1  channels                     35  2  gain before encoding, 1/100 dB
    6   1  codebooks of which are kept  37  2  loudness, 1/100 LUFS; -32768: unknown
    7   1  period; 0: a coded mask      39  4  CRC-32 of the kept tokens
    8   5  codec's fingerprint          43  4  CRC-32 of all other bytes
    13  7  model's fingerprint          47  .. payload
    20  4  fingerprint of arithmetic

A file is trusted in nothing: the checksum tells accidents, and the limits here and in
`vampnet_jax.compression.coding` hold whatever a file says.
"""

import dataclasses
import enum
import math
import struct
import zlib
from pathlib import Path

from codec_bridge.errors import InputError

MAGIC = b"VNT"
FORMAT_VERSION = 1
HEADER_BYTES = 47
MAX_FILE_BYTES = 256 * 2**20
MAX_CHANNELS = 2
MAX_CODEBOOKS = 255
MAX_PERIOD = 255
MAX_FRAMES = 2**24 - 1
MAX_TOKENS = 2**26
"""Channels x codebooks x frames; 256 MiB of int32, 20 hours of 16 codebooks."""
FRAMES_PER_BYTE = 1024
"""More frames than this per byte of the file are not believed."""
MAX_DB = 200.0
_LAYOUT = struct.Struct("<3sBBBBB5s7s4sII3shhI")
_UNKNOWN = -(2**15)


class Probabilities(enum.IntEnum):
    """Whose probabilities the tokens are coded under."""

    UNIFORM = 0
    TABLE = 1
    """How often each code of each codebook occurs in the model's training music."""
    MODEL = 2
    """What the model itself expects, given the tokens decoded so far."""


@dataclasses.dataclass(frozen=True)
class Header:
    """All that a file says apart from its tokens."""

    probabilities: Probabilities
    channels: int
    codebooks: int
    """Tokens of the first so many codebooks may be kept; the others never are."""
    period: int
    """Every so many frames are kept; 0: the payload says which tokens are."""
    codec: bytes
    """First 5 bytes of the codec's fingerprint."""
    model: bytes
    """First 7 bytes of the fingerprint of both stages and the table of frequencies."""
    arithmetic: bytes
    """4 bytes that tell whether probabilities come out alike; zeros if the model has no part."""
    seed: int
    n_samples: int
    n_frames: int
    gain_db: float
    loudness: float
    """NaN if unknown."""
    tokens_crc: int

    def check(self) -> None:
        """Raise InputError for what no file may say."""
        if not 1 <= self.channels <= MAX_CHANNELS:
            raise InputError(f"it has {self.channels} channels; 1 or {MAX_CHANNELS} are possible.")
        if not 1 <= self.codebooks <= MAX_CODEBOOKS or not 0 <= self.period <= MAX_PERIOD:
            raise InputError(
                f"it keeps {self.codebooks} codebooks with period {self.period}; 1 to "
                f"{MAX_CODEBOOKS} and 0 to {MAX_PERIOD} are possible."
            )
        if not 1 <= self.n_frames <= MAX_FRAMES or not 1 <= self.n_samples < 2**32:
            raise InputError(
                f"it has {self.n_frames} frames and {self.n_samples} samples; 1 to {MAX_FRAMES} "
                f"and 1 to {2**32 - 1} are possible."
            )
        if self.channels * self.codebooks * self.n_frames > MAX_TOKENS:
            raise InputError(f"it has more than {MAX_TOKENS} tokens; cut the music into parts.")
        if not abs(self.gain_db) <= MAX_DB or abs(self.loudness) > MAX_DB:
            raise InputError(f"it says {self.gain_db} dB of gain and {self.loudness} LUFS.")


def pack(header: Header, payload: bytes) -> bytes:
    """A whole file."""
    header.check()
    _check_length(header, HEADER_BYTES + len(payload))
    fields = _LAYOUT.pack(
        MAGIC, FORMAT_VERSION, header.probabilities, header.channels, header.codebooks,
        header.period, header.codec, header.model, header.arithmetic, header.seed,
        header.n_samples, header.n_frames.to_bytes(3, "little"), _hundredths(header.gain_db),
        _hundredths(header.loudness), header.tokens_crc,
    )  # fmt: skip
    return fields + _checksum(fields, payload) + payload


def unpack(data: bytes) -> tuple[Header, bytes]:
    """Header and payload of a file.

    Raises:
      InputError: not such a file, of another version, damaged, or with impossible values. The
        sentence begins with "it"; the caller knows the file's name.
    """
    if data[:3] != MAGIC:
        raise InputError("it is not a .vnt file.")
    if len(data) > 3 and data[3] != FORMAT_VERSION:
        raise InputError(f"it has format {data[3]}; this version reads {FORMAT_VERSION}.")
    if not HEADER_BYTES <= len(data) <= MAX_FILE_BYTES:
        raise InputError(
            f"it has {len(data)} bytes; {HEADER_BYTES} to {MAX_FILE_BYTES >> 20} MiB are possible."
        )
    fields, payload = data[: _LAYOUT.size], data[HEADER_BYTES:]
    if _checksum(fields, payload) != data[_LAYOUT.size : HEADER_BYTES]:
        raise InputError("it is damaged: its checksum does not fit; fetch or make it again.")
    (
        _, _, probabilities, channels, codebooks, period, codec, model, arithmetic, seed,
        n_samples, n_frames, gain, loudness, tokens_crc,
    ) = _LAYOUT.unpack(fields)  # fmt: skip
    if probabilities not in set(Probabilities):
        raise InputError(f"it is coded in an unknown way ({probabilities}).")
    header = Header(
        Probabilities(probabilities), channels, codebooks, period, codec, model, arithmetic, seed,
        n_samples, int.from_bytes(n_frames, "little"), gain / 100,
        math.nan if loudness == _UNKNOWN else loudness / 100, tokens_crc,
    )  # fmt: skip
    header.check()
    _check_length(header, len(data))
    return header, payload


def read_bytes(path: Path) -> bytes:
    """A file's bytes, if it is not larger than any `.vnt` file may be; InputError if not."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(f"{path} is larger than any .vnt file may be.")
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"there is no file {path}.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None


def _check_length(header: Header, n_bytes: int) -> None:
    if header.n_frames > FRAMES_PER_BYTE * n_bytes:
        raise InputError(f"it says that {n_bytes} bytes hold {header.n_frames} frames.")


def _checksum(fields: bytes, payload: bytes) -> bytes:
    return zlib.crc32(payload, zlib.crc32(fields)).to_bytes(4, "little")


def _hundredths(db: float) -> int:
    return round(100 * db) if math.isfinite(db) else _UNKNOWN
