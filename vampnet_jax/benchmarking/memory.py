"""Peak memory: of accelerators as JAX keeps account of it, else of the process."""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax


class Peak(NamedTuple):
    """The most memory that was in use."""

    bytes: int | None
    """None where it cannot be known."""
    of: str
    """What it is the peak of, in words."""


UNKNOWN = Peak(None, "unknown")


def reset() -> None:
    """Forget the process's peak so far, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak(devices: Sequence[jax.Device]) -> Peak:
    """The peak since `reset`; of accelerators, since the process began.

    Args:
      devices: what the transformers compute on. Of several the fullest counts.
    """
    if devices[0].platform == "cpu":
        return _of_process()
    stats: list[dict[str, Any]] = [device.memory_stats() or {} for device in devices]
    known = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    if not known:
        return UNKNOWN
    return Peak(max(known), "one device, without the codec, since the process began")


def _of_process() -> Peak:
    with contextlib.suppress(OSError, IndexError, ValueError):
        status = Path("/proc/self/status").read_text()
        return Peak(int(status.split("VmHWM:")[1].split()[0]) * 1024, "the process")
    if sys.platform == "win32":
        return UNKNOWN
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return Peak(used, "the process since it began")
