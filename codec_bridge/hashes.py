"""What tells files and weights apart: their SHA-256."""

import hashlib
import os
from collections.abc import Mapping

import numpy as np


def file_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256, in hexadecimal, that tells networks apart by their weights.

    Over the tensors in the order of their names (by code point), weight normalisation folded:
    the name in UTF-8, a zero byte, the shape as decimals joined by commas, a zero byte, then the
    values as little-endian float32 in C order.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = np.ascontiguousarray(tensors[name], dtype="<f4")
        shape = ",".join(map(str, values.shape))
        digest.update(name.encode() + b"\0" + shape.encode() + b"\0")
        digest.update(values.data)
    return digest.hexdigest()
