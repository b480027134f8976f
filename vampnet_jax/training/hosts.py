"""Hosts that write into one folder: how they divide the work, and how they keep apart."""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from codec_bridge.errors import InputError

NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
"""What file systems without locks answer."""
RANKS = (
    ("JAX_PROCESS_ID", "JAX_NUM_PROCESSES"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES"),
)
"""Where job systems write the number of a process, from 0, and how many there are (or who)."""


@dataclasses.dataclass(frozen=True)
class Host:
    """One of the hosts that tokenise into one folder."""

    number: int
    """From 1."""
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise InputError(
                f"Shard {self.number}/{self.count} is impossible; give 1/{max(self.count, 1)} to "
                f"{max(self.count, 1)}/{max(self.count, 1)}."
            )

    @property
    def label(self) -> str:
        """As in the names of its files."""
        return f"{self.number:05d}-of-{self.count:05d}"

    def has(self, name: str) -> bool:
        """Whether a track is this host's: by its name alone, so added files change nothing."""
        digest = hashlib.sha256(name.encode()).digest()
        return int.from_bytes(digest[:8], "big") % self.count == self.number - 1


def parse_host(text: str, environment: Mapping[str, str]) -> Host:
    """`2/4` is the second of four hosts; `auto` asks the job system (`RANKS`).

    Raises:
      InputError: neither, or there is no job system.
    """
    if text == "auto":
        text = _from_job_system(environment)
    match = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
    if match is None:
        raise InputError(f"shard is {text!r}; give number/hosts, such as 1/4, or auto.")
    return Host(int(match[1]), int(match[2]))


def _from_job_system(environment: Mapping[str, str]) -> str:
    for rank, size in RANKS:
        if environment.get(rank, "").isdecimal() and environment.get(size):
            count = environment[size]
            n_hosts = int(count) if count.isdecimal() else len(count.split(","))
            return f"{int(environment[rank]) + 1}/{n_hosts}"
    raise InputError(
        "shard is 'auto', but there is no job system here; give this host's number, such as 1/4."
    )


@contextlib.contextmanager
def alone(parts: Path, host: Host | None) -> Iterator[None]:
    """Hold the folder, or one host's share of it."""
    kinds = {"lock": fcntl.LOCK_EX}
    if host is not None:
        kinds = {"lock": fcntl.LOCK_SH, f"lock-{host.label}": fcntl.LOCK_EX}
    try:
        with contextlib.ExitStack() as held:
            for name, kind in kinds.items():
                held.enter_context(_locked(parts / name, kind))
            yield
    finally:
        for folder in (parts, parts.parent):  # goes if it is empty
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def _locked(path: Path, kind: int) -> Iterator[None]:
    """Hold a lock file; the system lets go of it however this process ends."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "w")  # noqa: SIM115 (closed below)
        except FileNotFoundError:  # a run that ends has just removed the folder
            continue
        except OSError as error:
            raise InputError(f"cannot write to {path.parent.parent}: {error.strerror}.") from error
        with file:
            can_lock = _lock(file.fileno(), kind, path.parent.parent)
            if not _is_at(file.fileno(), path):  # or this file: lock the one that others see
                continue
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # unless another host holds it
                    if can_lock:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
            return


def _lock(descriptor: int, kind: int, out: Path) -> bool:
    """Lock an open file without waiting; returns whether the file system has locks."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise InputError(
            f"Another `vampnet tokenize` is writing to {out}; wait for it to end."
        ) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise InputError(f"cannot lock {out}: {error.strerror}.") from error
        warnings.warn(
            f"{out} is on a file system without locks: let no two runs of one share write there.",
            stacklevel=2,
        )
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
