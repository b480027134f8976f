"""Codec files: our safetensors, descript-audio-codec's `.pth` and the original VampNet's `.pth`.

No file can run code: `.pth` files are read by PyTorch's restricted unpickler and only after the
archive has been checked, so that a small file cannot ask for much memory either.
"""

import json
import os
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors
import safetensors.numpy

from codec_bridge.atomic import atomic_write
from codec_bridge.codec import CHUNK_SECONDS, Codec, CodecConfig, build_network, fingerprint
from codec_bridge.errors import InputError

# descript-audio-codec's released weights: name -> (model type, bitrate) of its download helper.
RELEASED = {
    "44khz": ("44khz", "8kbps"),
    "44khz-16kbps": ("44khz", "16kbps"),
    "24khz": ("24khz", "8kbps"),
    "16khz": ("16khz", "8kbps"),
}
FORMAT_VERSION = 1
STORAGE = ("float32", "bfloat16")
# A checkpoint of a thousand tensors has a pickle of some hundred kilobytes.
MAX_PICKLE_BYTES = 32 * 2**20


def load(
    name_or_path: str | os.PathLike[str],
    *,
    device: str = "auto",
    chunk_seconds: float = CHUNK_SECONDS,
) -> Codec:
    """Load a codec; what kind it is, the file itself tells.

    Args:
      name_or_path: a `codec.safetensors` written by `save`, or a folder that holds one; a `.pth`
        of descript-audio-codec or of the original VampNet's LAC; or the name of weights released
        by descript-audio-codec ("44khz", "24khz", "16khz", "44khz-16kbps"), which are downloaded
        once.
      device: where the network runs: "cpu", "cuda", or "auto" for CUDA where PyTorch has it.
      chunk_seconds: audio in the network at a time; bounds the memory, not the results.

    Raises:
      InputError: no such file or name, a damaged or foreign file, or weights that do not fit.
    """
    path = Path(name_or_path)
    if path.is_dir():
        path = path / "codec.safetensors"
    if not path.exists():
        if str(name_or_path) not in RELEASED:
            raise InputError(
                f"there is no codec at {path}; give a codec file or one of {', '.join(RELEASED)}"
            )
        path = _download(str(name_or_path))
    with _open(path) as file:
        head = file.read(9)
    if head[8:] == b"{":
        kind, config, tensors = _read_safetensors(path)
    else:
        kind, config, tensors = _read_codec_pth(path)
    return Codec(kind, config, tensors, device=device, chunk_seconds=chunk_seconds)


def save(codec: Codec, path: str | os.PathLike[str], *, dtype: str = "float32") -> None:
    """Write a codec as safetensors with its kind, configuration and fingerprint as metadata.

    Args:
      dtype: "float32", or "bfloat16" for half the size. The weights are then rounded, and the
        file is another codec with a fingerprint of its own: that of the rounded weights.

    Raises:
      InputError: an unknown dtype, or a path that cannot be written.
    """
    if dtype not in STORAGE:
        raise InputError(f"codec weights are stored as {' or '.join(STORAGE)}, not {dtype}")
    tensors, identity = codec.tensors, codec.fingerprint
    if dtype == "bfloat16":
        import ml_dtypes

        tensors = {name: t.astype(ml_dtypes.bfloat16) for name, t in tensors.items()}
        identity = fingerprint({name: t.astype(np.float32) for name, t in tensors.items()})
    metadata = {
        "format_version": str(FORMAT_VERSION),
        "kind": codec.kind,
        "config": codec.config.to_json(),
        "fingerprint": identity,
    }
    tensors = {name: np.ascontiguousarray(t) for name, t in tensors.items()}
    with atomic_write(path) as temporary:
        safetensors.numpy.save_file(tensors, temporary, metadata=metadata)


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
    with _open(path) as file:
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
    state, metadata = content, {}
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


def _open(path: Path) -> IO[bytes]:
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


def _read_codec_pth(path: Path) -> tuple[str, CodecConfig, dict[str, np.ndarray]]:
    checkpoint = read_pth(path)
    state = checkpoint["state_dict"]
    kwargs = checkpoint["metadata"].get("kwargs")
    if not any(name.startswith("quantizer.quantizers.") for name in state) or not isinstance(
        kwargs, dict
    ):
        raise InputError(
            f"{path} is not a codec: neither descript-audio-codec's nor the original VampNet's"
        )
    # LAC's decoder has three parallel stacks after every upsampling, DAC's has one.
    kind = "lac" if any(".mrf_blocks." in name for name in state) else "dac"
    try:
        config = CodecConfig.from_kwargs(kwargs)
        tensors = _fold(state)
        build_network(kind, config, tensors)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return kind, config, tensors


def _fold(state: dict[str, Any]) -> dict[str, np.ndarray]:
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


def _read_safetensors(path: Path) -> tuple[str, CodecConfig, dict[str, np.ndarray]]:
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise InputError(f"{path} is damaged or truncated: {error}") from error
    if not {"kind", "config", "fingerprint", "format_version"} <= metadata.keys():
        raise InputError(f"{path} is not a codec file: its metadata has no kind and configuration")
    if metadata["format_version"] != str(FORMAT_VERSION):
        raise InputError(
            f"{path} has format version {metadata['format_version']}, and this program reads "
            f"version {FORMAT_VERSION}; it may need an update"
        )
    for name, tensor in tensors.items():
        if str(tensor.dtype) not in STORAGE:
            raise InputError(f"{path} holds {name} as {tensor.dtype}, which is no codec weight")
        tensors[name] = tensor.astype(np.float32, copy=False)
    if fingerprint(tensors) != metadata["fingerprint"]:
        raise InputError(f"{path} is damaged: its weights do not match their fingerprint")
    try:
        kwargs = json.loads(metadata["config"])
        if not isinstance(kwargs, dict):
            raise InputError("the codec's configuration is not a JSON object")
        config = CodecConfig.from_kwargs(kwargs)
    except (InputError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: {error}") from error
    return metadata["kind"], config, tensors


def _download(name: str) -> Path:
    from codec_bridge.descript import import_dac

    model_type, bitrate = RELEASED[name]
    try:
        return Path(import_dac().utils.download(model_type=model_type, model_bitrate=bitrate))
    except (OSError, ValueError) as error:  # requests' exceptions are OSErrors
        raise InputError(
            f"the codec {name} could not be downloaded: is this machine online? "
            "A weights file fetched elsewhere can be given by its path"
        ) from error
