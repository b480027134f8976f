"""Token frequencies of the training tracks, counted once and kept with the run."""

import hashlib
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open

from codec_bridge.atomic import atomic_write
from codec_bridge.errors import InputError
from vampnet_jax.training.tokens import TrackReader
from vampnet_jax.training.validation import token_frequencies

FREQUENCIES = "frequencies.safetensors"


def kept_frequencies(run: Path, reader: TrackReader) -> tuple[np.ndarray, bool]:
    """How often each code of each codebook occurs in the tracks, `[C, V]`, rows summing to 1.

    Read from the run's folder if they were counted in the same tracks before; else counted, which
    reads every track, and written there. Of several processes the first does so, and all must call
    this.

    Returns:
      The frequencies, and whether they had been counted in other tracks.
    """
    if jax.process_count() == 1:
        return _read_or_count(run / FREQUENCIES, reader)
    codec = reader.manifest.codec
    values = np.zeros((codec.n_codebooks, codec.codebook_size)), False
    problem = None
    if jax.process_index() == 0:
        try:
            values = _read_or_count(run / FREQUENCIES, reader)
        except Exception as error:  # the others wait for an answer
            problem = error
    failed = multihost_utils.broadcast_one_to_all(np.int32(problem is not None))
    if problem is not None:
        raise problem
    if failed:
        raise InputError("Process 0 could not count the tokens; its message says why.")
    frequencies, anew = multihost_utils.broadcast_one_to_all(
        (values[0].astype(np.float32), np.int32(values[1]))
    )
    return np.asarray(frequencies), bool(anew)


def _read_or_count(path: Path, reader: TrackReader) -> tuple[np.ndarray, bool]:
    tracks, others = _digest(reader), False
    try:
        with safe_open(path, framework="numpy") as file:
            if (file.metadata() or {}).get("tracks") == tracks:
                return file.get_tensor("frequencies"), False
            others = True
    except (OSError, SafetensorError):  # not there, or damaged: count again
        pass
    frequencies = token_frequencies(reader)
    blob = safetensors.numpy.save({"frequencies": frequencies}, metadata={"tracks": tracks})
    with atomic_write(path) as temporary:
        temporary.write_bytes(blob)
    return frequencies, others


def _digest(reader: TrackReader) -> str:
    """Tells which tracks, in which state, were counted."""
    lines = [reader.manifest.codec.fingerprint]
    lines += [
        f"{t.name} {t.frames} {t.shard} {t.record} {t.file_bytes} {t.file_modified}"
        for t in reader.tracks
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
