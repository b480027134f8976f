"""`frequencies.safetensors` beside a model: how often its training music has each token.

`counts`: uint16 [C, V], at least 1 each, every codebook's summing to 65536; the codec's
fingerprint is in the metadata. The file is optional: without it tokens are coded as if all were
equally likely, at 10 bits each where there are 1024.
"""

from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from codec_bridge import Codec
from codec_bridge.atomic import atomic_write
from codec_bridge.errors import InputError

FREQUENCIES = "frequencies.safetensors"
TOTAL = 2**16


def quantise(frequencies: np.ndarray) -> np.ndarray:
    """Probabilities or counts `[C, V]` as int32 of at least 1 whose rows sum to 65536."""
    values = np.asarray(frequencies, np.float64)
    n_codes = values.shape[1]
    if values.ndim != 2 or not 2 <= n_codes <= TOTAL // 2:
        raise ValueError(f"frequencies are {values.shape}; [C, V] with V up to {TOTAL // 2}")
    if not (np.isfinite(values).all() and (values >= 0).all() and (values.sum(1) > 0).all()):
        raise ValueError("frequencies must be finite, not negative, and not all 0 in a codebook")
    share = values / values.sum(axis=1, keepdims=True) * (TOTAL - n_codes)
    counts = 1 + np.floor(share).astype(np.int32)
    for row, rest in zip(counts, share - np.floor(share), strict=True):
        largest = np.argsort(-rest, kind="stable")[: TOTAL - int(row.sum())]
        row[largest] += 1
    return counts


def save_frequencies(directory: Path, frequencies: np.ndarray, codec_fingerprint: str) -> None:
    """Write the file into a model directory.

    Args:
      frequencies: `[C, V]` probabilities or counts.
      codec_fingerprint: of the codec whose tokens were counted.
    """
    counts = quantise(frequencies).astype(np.uint16)
    blob = safetensors.numpy.save({"counts": counts}, metadata={"codec": codec_fingerprint})
    with atomic_write(directory / FREQUENCIES) as path:
        path.write_bytes(blob)


def load_frequencies(directory: Path, codec: Codec, n_codebooks: int) -> np.ndarray | None:
    """Read the file of a model directory.

    Returns:
      int32 `[n_codebooks, V]`, or None if the model has no such file.

    Raises:
      InputError: the file is damaged, or was counted in tokens of another codec.
    """
    path = directory / FREQUENCIES
    if not path.is_file():
        return None
    wanted = (n_codebooks, codec.codebook_size)
    try:
        with safe_open(path, framework="numpy") as file:
            fingerprint = (file.metadata() or {}).get("codec")
            counts = file.get_slice("counts")
            shape, dtype = tuple(counts.get_shape()), counts.get_dtype()
            values = counts[:].astype(np.int32) if (shape, dtype) == (wanted, "U16") else None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged ({error}); fetch or make it again.") from None
    if fingerprint != codec.fingerprint:
        raise InputError(
            f"{path} was counted in tokens of another codec; delete it, or count again."
        )
    if values is None or values.min() < 1 or (values.sum(axis=1) != TOTAL).any():
        raise InputError(f"{path} has no frequencies of {wanted[0]} x {wanted[1]} tokens.")
    return values
