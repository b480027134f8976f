"""Where JAX computes, and the compiled programs it keeps between runs."""

import os
import sys
from pathlib import Path
from typing import Literal, get_args

import jax

from codec_bridge.errors import InputError

Device = Literal["auto", "cpu", "gpu", "tpu"]


def select(device: Device) -> list[jax.Device]:
    """Make JAX compute on a kind of device; before anything is computed.

    "auto" leaves the choice to JAX (and to JAX_PLATFORMS): a TPU or GPU if there is one.

    Returns:
      All devices of that kind; JAX computes on the first.

    Raises:
      InputError: there is no such device here.
    """
    if device == "auto":
        return jax.devices()
    if device not in get_args(Device):
        raise InputError(f"device is {device!r}; choose one of {', '.join(get_args(Device))}.")
    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")  # or an idle GPU would be started as well
    try:
        found = jax.devices(device)
    except RuntimeError:
        raise InputError(
            f"device is {device!r}, but JAX finds no {device.upper()} here; install "
            f"vampnet-jax[{'cuda' if device == 'gpu' else device}] or choose 'cpu'."
        ) from None
    jax.config.update("jax_default_device", found[0])
    return found


def of_codec(device: Device) -> str:
    """Where the codec computes then: "cpu" keeps it off the GPU, too."""
    return "cpu" if device == "cpu" else "auto"


def keep_compiled_programs() -> None:
    """Let JAX keep what it compiles in the user's cache folder, so that later runs start fast.

    JAX_COMPILATION_CACHE_DIR, if set, names another folder.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def cache_folder() -> Path:
    """This project's folder for what can be made again; it need not exist."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
    else:
        base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "vampnet_jax"
    home = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return home / "vampnet_jax"
