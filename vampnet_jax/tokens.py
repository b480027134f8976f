"""Files of arrays over codebooks and frames: tokens (`.npz`) and a person's own masks (`.npy`).

Reading checks names, types and sizes from the headers before anything is decompressed, and never
unpickles.
"""

import dataclasses
import io
import math
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from codec_bridge.atomic import atomic_write
from codec_bridge.errors import InputError

FORMAT_VERSION = 1
MAX_BYTES = 256 * 2**20
"""Largest array that is read: 256 MiB are 20 hours of 16 codebooks."""
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Those that numpy.savez and savez_compressed use."""
MAX_CHANNELS = 64
MAX_CODEBOOKS = 256
MAX_GAIN_DB = 200.0


@dataclasses.dataclass(frozen=True, eq=False)
class TokenFile:
    """The tokens of one clip, and which codec can decode them."""

    tokens: np.ndarray
    """int32 `[channels, C, T]`."""
    codec_fingerprint: str
    """SHA-256 of the codec's weights, in hexadecimal digits."""
    sample_rate: int
    """Of the codec, in Hz."""
    hop_length: int
    """Samples per frame."""
    n_samples: int
    """Length of the clip; its last frame may be filled in part."""
    gain_db: float = 0.0
    """Gain that the audio was given before it was encoded."""

    def check(self, path: str | os.PathLike[str], codec, n_codebooks: int) -> None:
        """Raise InputError unless these are tokens of this codec, of `n_codebooks` codebooks."""
        if self.codec_fingerprint != codec.fingerprint:
            raise InputError(
                f"{path} holds tokens of another codec (fingerprint "
                f"{self.codec_fingerprint[:12] or 'missing'}, this model's codec has "
                f"{codec.fingerprint[:12]}); use the model that they were made with."
            )
        rates = (self.sample_rate, self.hop_length)
        if rates != (codec.sample_rate, codec.hop_length):
            raise InputError(
                f"{path} says {rates[0]} Hz and hop {rates[1]}; its codec has "
                f"{codec.sample_rate} Hz and hop {codec.hop_length}."
            )
        if self.tokens.shape[1] != n_codebooks:
            raise InputError(
                f"{path} has {self.tokens.shape[1]} codebooks; the model needs {n_codebooks}."
            )
        highest = int(self.tokens.max())
        if highest >= codec.codebook_size:
            raise InputError(
                f"{path} has token {highest}; this codec's go from 0 to {codec.codebook_size - 1}."
            )


def write(path: str | os.PathLike[str], clip: TokenFile) -> None:
    """Write a token file; a file of that name is replaced only when all is written."""
    fields: dict[str, Any] = {
        "format_version": np.int32(FORMAT_VERSION),
        "tokens": clip.tokens.astype(np.int32),
        "codec_fingerprint": np.str_(clip.codec_fingerprint),
        "sample_rate": np.int64(clip.sample_rate),
        "hop_length": np.int64(clip.hop_length),
        "n_samples": np.int64(clip.n_samples),
        "gain_db": np.float64(clip.gain_db),
    }
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, allow_pickle=False, **fields)


def read(path: str | os.PathLike[str]) -> TokenFile:
    """Read a token file.

    Needed in it: `format_version`, `tokens` (integers `[C, T]` or `[channels, C, T]`),
    `codec_fingerprint`, `sample_rate` and `hop_length`; without `n_samples` the clip
    ends with its last frame, without `gain_db` it is 0.

    Raises:
      InputError: not a token file, a newer format, or implausible contents. Whether the tokens fit
        a codec is for `TokenFile.check` to say.
    """
    fields = _read_npz(Path(path))
    try:
        version = int(fields["format_version"])
        tokens = fields["tokens"]
        fingerprint = str(fields["codec_fingerprint"])
        sample_rate, hop_length = int(fields["sample_rate"]), int(fields["hop_length"])
        length = tokens.shape[-1] * hop_length if tokens.ndim else 0
        n_samples = int(fields.get("n_samples", length))
        gain_db = float(fields.get("gain_db", 0.0))
    except KeyError as error:
        raise InputError(f"{path} is not a token file: it has no {error.args[0]!r}.") from error
    except (TypeError, ValueError) as error:
        raise InputError(f"{path} is not a token file: a field has the wrong type.") from error
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path} is a token file of format {version}; this version reads {FORMAT_VERSION}."
        )
    if tokens.dtype.kind not in "iu" or tokens.ndim not in (2, 3) or not tokens.size:
        raise InputError(
            f"{path} has tokens of shape {tokens.shape} and type {tokens.dtype}; they must be "
            "integers of shape [C, T] or [channels, C, T]."
        )
    tokens = tokens.reshape(-1, *tokens.shape[-2:])
    if tokens.shape[0] > MAX_CHANNELS or tokens.shape[1] > MAX_CODEBOOKS:
        raise InputError(
            f"{path} has {tokens.shape[0]} channels and {tokens.shape[1]} codebooks; "
            f"{MAX_CHANNELS} and {MAX_CODEBOOKS} are the most that are read."
        )
    if not (0 < n_samples <= length and sample_rate > 0 and abs(gain_db) <= MAX_GAIN_DB):
        raise InputError(
            f"{path} has an impossible length ({n_samples} samples), rate ({sample_rate} Hz) or "
            f"gain ({gain_db:g} dB)."
        )
    if int(tokens.max()) > np.iinfo(np.int32).max or int(tokens.min()) < 0:
        raise InputError(f"{path} has tokens from {tokens.min()} to {tokens.max()}; no codec has.")
    return TokenFile(
        tokens.astype(np.int32), fingerprint, sample_rate, hop_length, n_samples, gain_db
    )


def read_mask(path: str | os.PathLike[str], n_codebooks: int, n_frames: int) -> np.ndarray:
    """Read a person's own mask: `.npy`, True or 1 = generate.

    Args:
      path: a file of shape `[T]` (for all codebooks), `[C, T]` or `[1, C, T]`, bool or integers
        0 and 1.
      n_codebooks, n_frames: C and T of the clip it is for.

    Returns:
      bool `[C, T]`.
    """
    wanted = (n_codebooks, n_frames)
    try:
        mask = np.load(path, allow_pickle=False, mmap_mode="r")
    except FileNotFoundError as error:
        raise InputError(f"there is no mask {path}.") from error
    except (OSError, ValueError, EOFError, OverflowError, MemoryError) as error:
        raise InputError(f"{path} is not a .npy file of numbers.") from error
    if not isinstance(mask, np.ndarray) or mask.dtype.kind not in "biu":
        raise InputError(f"{path} must hold one array of booleans or of integers 0 and 1.")
    if mask.shape not in (wanted, (n_frames,), (1, *wanted)):
        raise InputError(
            f"the mask in {path} has shape {mask.shape}; this clip needs {wanted} (codebooks, "
            f"frames) or ({n_frames},)."
        )
    if mask.dtype.kind != "b" and not np.isin(mask, (0, 1)).all():
        raise InputError(f"the mask in {path} has values other than 0 (keep) and 1 (generate).")
    mask = np.asarray(mask, bool)
    return np.broadcast_to(mask.reshape(-1, n_frames), wanted)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type not in COMPRESSIONS for entry in entries):
                raise ValueError("compressed as NumPy never does")
            if sum(entry.file_size for entry in entries) > MAX_BYTES:
                raise InputError(f"{path} would unpack to more than {MAX_BYTES >> 20} MiB.")
            return {
                entry.filename.removesuffix(".npy"): _parse_npy(archive.read(entry))
                for entry in entries
            }
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}.") from error
    except InputError:
        raise
    except (
        OSError, ValueError, EOFError, OverflowError, RuntimeError, zipfile.BadZipFile, zlib.error
    ) as error:  # fmt: skip
        raise InputError(f"{path} is not a token file, or it is damaged.") from error


def _parse_npy(data: bytes) -> np.ndarray:
    """As numpy reads it, but nothing is allocated before its size is known to be there."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    else:
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(stream)
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(data) - stream.tell():
        raise ValueError("an array of objects, or of another size than its header says")
    values = np.frombuffer(data, dtype, offset=stream.tell())
    return values.reshape(shape, order="F" if fortran else "C")
