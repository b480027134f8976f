"""What can end a run early: requests to stop, disks that are full, data that is gone."""

import contextlib
import enum
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from codec_bridge.errors import InputError, no_space


class Ending(enum.Enum):
    """How a run ended; its state is saved in every case."""

    FINISHED = enum.auto()
    INTERRUPTED = enum.auto()
    """By Ctrl-C."""
    TERMINATED = enum.auto()
    """By SIGTERM or a notice of preemption: to be continued."""


StopRequests = Callable[[int], Ending | None]
"""Step → whether to stop before it, and why."""


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Listen for requests to stop: Ctrl-C and SIGTERM; a second Ctrl-C interrupts at once.

    With several processes a SIGTERM to any of them (schedulers send it before preempting) makes
    all of them stop before the same step, which JAX's preemption service agrees on; it must then be
    asked before every step.
    """
    asked: list[Ending] = []
    several = jax.process_count() > 1

    def wanted(step: int) -> Ending | None:
        if several and not multihost_utils.reached_preemption_sync_point(step):
            return None
        return asked[0] if asked else Ending.TERMINATED if several else None

    def ask(number: int, frame: object) -> None:
        asked.append(Ending.TERMINATED if number == signal.SIGTERM else Ending.INTERRUPTED)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if several:
            os.kill(os.getpid(), signal.SIGTERM)  # so that the other processes hear of it

    if threading.current_thread() is not threading.main_thread():
        yield wanted
        return
    # With several processes SIGTERM is the preemption service's.
    numbers = [signal.SIGINT] if several else [signal.SIGINT, signal.SIGTERM]
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield wanted
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextlib.contextmanager
def writing(run: Path) -> Iterator[None]:
    """A context for writing to the run's folder.

    Raises:
      InputError: it could not be written; says so if the disk is full.
    """
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        kept = "the last complete checkpoint stays"
        if no_space(error):
            raise InputError(
                f"The disk of {run} is full ({_free(run)}); {kept}: make room and run the same "
                "command again."
            ) from error
        raise InputError(
            f"{run} cannot be written to ({brief(error)}); {kept}: mend that and run the same "
            "command again."
        ) from error


@contextlib.contextmanager
def reading(folder: str | Path) -> Iterator[None]:
    """A context for reading the training data.

    Raises:
      InputError: it cannot be read any more.
    """
    try:
        yield
    except InputError as error:
        if not _is_gone(folder):
            raise
        raise InputError(_gone(folder)) from error
    except (OSError, ValueError, RuntimeError) as error:
        if _is_gone(folder):
            raise InputError(_gone(folder)) from error
        raise InputError(
            f"The tokens in {folder} cannot be read any more ({brief(error)}); mend that, then "
            "run the same command again."
        ) from error


def _is_gone(folder: str | Path) -> bool:
    return ":/" not in str(folder) and not Path(folder).is_dir()


def _gone(folder: str | Path) -> str:
    return f"{folder} is gone; bring the tokens back, then run the same command again."


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB free are not enough"
    except OSError:
        return "free space unknown"


def brief(error: BaseException) -> str:
    """The first line of what an error says, or its kind."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
