"""Codec files: our safetensors, descript-audio-codec's `.pth` and the original VampNet's `.pth`."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from codec_bridge.atomic import atomic_write
from codec_bridge.codec import CHUNK_SECONDS, Codec
from codec_bridge.config import CodecConfig
from codec_bridge.errors import InputError
from codec_bridge.hashes import fingerprint
from codec_bridge.network import build_network
from codec_bridge.pth import fold_state_dict, open_file, read_pth

# descript-audio-codec's released weights: name -> (model type, bitrate) of its download helper.
RELEASED = {
    "44khz": ("44khz", "8kbps"),
    "44khz-16kbps": ("44khz", "16kbps"),
    "24khz": ("24khz", "8kbps"),
    "16khz": ("16khz", "8kbps"),
}
FORMAT_VERSION = 1
STORAGE = ("float32", "bfloat16")


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
    with open_file(path) as file:
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
    metadata["checksum"] = _checksum(metadata)
    tensors = {name: np.ascontiguousarray(t) for name, t in tensors.items()}
    with atomic_write(path) as temporary:
        safetensors.numpy.save_file(tensors, temporary, metadata=metadata)


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
        tensors = fold_state_dict(state)
        build_network(kind, config, tensors)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return kind, config, tensors


def _read_safetensors(path: Path) -> tuple[str, CodecConfig, dict[str, np.ndarray]]:
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise InputError(f"{path} is damaged or truncated: {error}") from error
    if not {"kind", "config", "fingerprint", "format_version", "checksum"} <= metadata.keys():
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
    if _checksum(metadata) != metadata["checksum"] or (
        fingerprint(tensors) != metadata["fingerprint"]
    ):
        raise InputError(f"{path} is damaged: its contents do not match their checksums")
    try:
        kwargs = json.loads(metadata["config"])
        if not isinstance(kwargs, dict):
            raise InputError("the codec's configuration is not a JSON object")
        config = CodecConfig.from_kwargs(kwargs)
    except (InputError, ValueError, RecursionError) as error:  # an endless integer, too
        raise InputError(f"{path}: {error}") from error
    return metadata["kind"], config, tensors


def _checksum(metadata: dict[str, str]) -> str:
    """SHA-256 over what the file says about its weights; the fingerprint covers them."""
    said = [metadata[name] for name in ("format_version", "kind", "config", "fingerprint")]
    return hashlib.sha256("\0".join(said).encode()).hexdigest()


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
