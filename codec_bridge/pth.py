"""Read `.pth` checkpoints without running code, and fold their weight normalisation.

PyTorch's restricted unpickler reads a file only after its archive has been checked, so that a
small file cannot ask for much memory either.
"""

import os
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from codec_bridge.errors import InputError

# A checkpoint of a thousand tensors has a pickle of some hundred kilobytes.
MAX_PICKLE_BYTES = 32 * 2**20


def read_pth(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a PyTorch checkpoint without running anything that it contains.

    Args:
      path: a file written by `torch.save`: either {"state_dict": …, "metadata": …} or a bare
        dictionary of tensors.

    Returns:
      {"state_dict": {name: dense CPU tensor}, "metadata": dict}; `_orig_mod.`, which
      `torch.compile` puts into names, is taken out. The metadata of a bare dictionary is empty.

    Raises:
      InputError: the file is missing, not such a checkpoint, truncated or damaged, holds objects
        other than tensors and plain values, or claims more memory than its size warrants.
    """
    import torch

    path = Path(path)
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        _check_archive(path, file, size)
        file.seek(0)
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except MemoryError:
            raise
        except Exception as error:  # whatever a damaged or hostile pickle makes PyTorch raise
            raise InputError(
                f"{path} is not a plain PyTorch checkpoint: it is damaged or holds more than "
                "tensors and simple values, so it was not loaded"
            ) from error
    state: Any = content
    metadata: Any = {}
    if isinstance(content, dict) and "state_dict" in content:
        state, metadata = content["state_dict"], content.get("metadata") or {}
    if not isinstance(state, dict) or not isinstance(metadata, dict) or not state:
        raise InputError(f"{path} holds no state_dict of tensors, so it is no checkpoint")
    tensors: dict[str, Any] = {}
    claimed = 0
    for key, tensor in state.items():
        if (
            not isinstance(key, str)
            or type(tensor) not in (torch.Tensor, torch.nn.Parameter)
            or tensor.layout != torch.strided
            or tensor.device.type != "cpu"
            or tensor.is_quantized
        ):
            raise InputError(f"{path} holds {str(key)[:80]}, which is not a dense tensor")
        name = key.replace("_orig_mod.", "")
        if name in tensors:
            raise InputError(f"{path} holds {name} twice, with and without _orig_mod.")
        tensors[name] = tensor.detach()
        # A view can repeat one stored number endlessly.
        claimed += tensor.numel() * tensor.element_size()
    if claimed > size:
        raise InputError(f"{path} claims tensors of {claimed} bytes in a file of {size} bytes")
    return {"state_dict": tensors, "metadata": metadata}


def fold_state_dict(state: dict[str, Any]) -> dict[str, np.ndarray]:
    """Tensors as float32 arrays with weight normalisation folded; empties `state` on the way."""
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(state):
        if name not in state:
            continue  # folded together with its partner
        values = _float32(name, state.pop(name))
        for magnitude, direction in _WEIGHT_NORM:
            if name.endswith(magnitude):
                partner = name.removesuffix(magnitude) + direction
                if partner not in state:
                    raise InputError(f"{name} comes without {partner}")
                name = name.removesuffix(magnitude) + ".weight"
                vectors = _float32(partner, state.pop(partner))
                expected = (*vectors.shape[:1], *[1] * (vectors.ndim - 1))
                if values.shape != expected:
                    raise InputError(f"{partner} and its magnitude do not fit together")
                values = fold_weight_norm(vectors, values)
                break
        if name in tensors:
            raise InputError(f"{name} is given twice, with and without weight normalisation")
        if not np.isfinite(values).all():
            raise InputError(f"{name} has values that are not finite (NaN or infinity)")
        tensors[name] = values
    return tensors


# (g, v) in the two forms in which PyTorch keeps weight normalisation; sorted, g comes before v.
_WEIGHT_NORM = (
    (".weight_g", ".weight_v"),
    (".parametrizations.weight.original0", ".parametrizations.weight.original1"),
)


def _float32(name: str, tensor: Any) -> np.ndarray:
    if not tensor.is_floating_point():
        raise InputError(f"{name} is {tensor.dtype}; codec weights are floating-point numbers")
    return tensor.float().contiguous().numpy()


def fold_weight_norm(direction: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
    """The weight g · v / ‖v‖, normed over all axes but the first; all float32.

    The norm is summed in float64 and rounded, so that the result, and with it a fingerprint, does
    not depend on the machine's order of summation. With `weight_norm(weight)` as magnitude the
    weight itself comes back, bit for bit.
    """
    return direction * (magnitude / weight_norm(direction))


def weight_norm(weight: np.ndarray) -> np.ndarray:
    """‖w‖ over all axes but the first, kept as axes of length 1; float32."""
    axes = tuple(range(1, weight.ndim))
    return np.sqrt(np.square(weight, dtype=np.float64).sum(axes, keepdims=True)).astype(np.float32)


def open_file(path: Path) -> IO[bytes]:
    if not path.exists():
        raise InputError(f"there is no file {path}")
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    try:
        return open(path, "rb")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


def _check_archive(path: Path, file: IO[bytes], size: int) -> None:
    """Refuse everything but an intact, uncompressed archive such as torch.save writes."""
    if not zipfile.is_zipfile(file):
        raise InputError(
            f"{path} is not a PyTorch checkpoint, or is truncated (files written before "
            "PyTorch 1.6 must be saved again by a newer one)"
        )
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            names = {entry.filename.partition("/")[2] for entry in entries}
            if any(name.startswith((".data/extern_modules", "code/")) for name in names):
                raise InputError(
                    f"{path} is a torch.package or TorchScript archive, which contains code; "
                    "only a plain checkpoint (state_dict) is loaded"
                )
            if "data.pkl" not in names:
                raise InputError(f"{path} is a zip archive but not a PyTorch checkpoint")
            if (
                any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
                or sum(entry.file_size for entry in entries) > size
                or len({entry.filename for entry in entries}) < len(entries)
            ):
                raise InputError(f"{path} is packed unlike a PyTorch checkpoint, so it is refused")
            if any(
                entry.filename.endswith(".pkl") and entry.file_size > MAX_PICKLE_BYTES
                for entry in entries
            ):
                raise InputError(f"{path} has a table of contents too large for a checkpoint")
            # PyTorch itself does not check the checksums.
            damaged = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        raise InputError(f"{path} is damaged or truncated: {error}") from error
    if damaged is not None:
        raise InputError(f"{path} is damaged: the checksum of {damaged} is wrong")
