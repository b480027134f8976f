"""Token frequencies of the training tracks, counted once and kept with the run."""

import hashlib
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from codec_bridge.atomic import atomic_write
from vampnet_jax.training.tokens import TrackReader
from vampnet_jax.training.validation import token_frequencies

FREQUENCIES = "frequencies.safetensors"


def kept_frequencies(run: Path, reader: TrackReader) -> np.ndarray:
    """How often each code of each codebook occurs in the tracks, `[C, V]`, rows summing to 1.

    Read from the run's folder if they were counted in the same tracks before; else counted, which
    reads every track, and written there.
    """
    path = run / FREQUENCIES
    tracks = _digest(reader)
    try:
        with safe_open(path, framework="numpy") as file:
            if (file.metadata() or {}).get("tracks") == tracks:
                return file.get_tensor("frequencies")
    except (OSError, SafetensorError):  # not there, or damaged: count again
        pass
    frequencies = token_frequencies(reader)
    if jax.process_index() == 0:
        blob = safetensors.numpy.save({"frequencies": frequencies}, metadata={"tracks": tracks})
        with atomic_write(path) as temporary:
            temporary.write_bytes(blob)
    return frequencies


def _digest(reader: TrackReader) -> str:
    """Tells which tracks, in which state, were counted."""
    lines = [reader.manifest.codec.fingerprint]
    lines += [
        f"{t.name} {t.frames} {t.shard} {t.record} {t.file_bytes} {t.file_modified}"
        for t in reader.tracks
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
