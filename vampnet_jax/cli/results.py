"""What a run writes: files that appear whole or not at all, and the record to repeat it from."""

import contextlib
import dataclasses
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from codec_bridge.errors import InputError
from codec_bridge.hashes import file_hash
from vampnet_jax.cli.status import INTERRUPTED

FORMAT_VERSION = 1
PACKAGES = ("vampnet-jax", "jax", "jaxlib", "flax", "torch", "numpy", "soxr")
"""Those whose versions can change a result."""


class Results:
    """A folder of results, filled through a hidden folder inside it.

    As a context manager: what is not committed when it ends is removed, and so is the folder itself
    if it was made for this run and stayed empty.
    """

    def __init__(self, folder: Path, names: list[str], *, overwrite: bool):
        """Check that the files can be written, without writing anything.

        Args:
          folder: where; made on entering if it is not there.
          names: of all files that will be committed.
          overwrite: whether existing ones may be replaced.

        Raises:
          InputError: the folder cannot be written to, or a file exists.
        """
        self.folder, self.overwrite = folder, overwrite
        self._lock = threading.Lock()
        self._made: list[Path] = []
        above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not above.is_dir():
            raise InputError(f"{folder} cannot be written to: {above} is not a folder.")
        try:
            with tempfile.TemporaryFile(dir=above):
                pass
        except OSError as error:
            raise InputError(f"{folder} cannot be written to: {error.strerror}.") from None
        self._refuse_existing(names)

    def __enter__(self) -> "Results":
        missing = [p for p in (self.folder, *self.folder.absolute().parents) if not p.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._made = missing
            self.staging = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=self.folder))
        except OSError as error:
            raise InputError(f"{self.folder} cannot be written to: {error.strerror}.") from None
        return self

    def __exit__(self, *exception: object) -> None:
        self.discard()

    def commit(self, names: list[str]) -> None:
        """Move files from the staging folder to their place."""
        with self._lock:
            self._refuse_existing(names)
            for name in names:
                os.replace(self.staging / name, self.folder / name)

    def discard(self) -> None:
        """Remove what was not committed; never waits for the work to end."""
        with self._lock:
            shutil.rmtree(self.staging, ignore_errors=True)
            with contextlib.suppress(OSError):  # not empty
                for folder in self._made:
                    folder.rmdir()

    def _refuse_existing(self, names: list[str]) -> None:
        existing = [name for name in names if (self.folder / name).exists()]
        if existing and not self.overwrite:
            more = f" (and {len(existing) - 1} more)" if len(existing) > 1 else ""
            raise InputError(
                f"{self.folder / existing[0]} exists{more}; choose another folder with -o, or "
                "replace it with --overwrite."
            )
        folders = [name for name in existing if (self.folder / name).is_dir()]
        if folders:
            raise InputError(f"{self.folder / folders[0]} is a folder and cannot be replaced.")


def run_interruptibly(work: Callable[[], None], clean_up: Callable[[], None]) -> None:
    """Run work such that Ctrl-C, or a request to terminate, ends the process at once.

    A computation inside JAX or PyTorch does not return to Python before it is done. It therefore
    runs in a second thread, and on Ctrl-C the first one cleans up and leaves without waiting.
    """
    errors: list[BaseException] = []

    def target() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=target, daemon=True)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.1)  # Windows delivers Ctrl-C only between waits
    except KeyboardInterrupt:
        clean_up()
        Console(stderr=True).show_cursor()  # a progress bar hides it
        print("\ninterrupted", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)
    finally:
        signal.signal(signal.SIGTERM, before)
    if errors:
        raise errors[0]


def environment() -> dict[str, Any]:
    """What else a result can depend on: versions, platform, device."""
    import jax

    return {
        "versions": {"python": platform.python_version()} | {n: version(n) for n in PACKAGES},
        "platform": platform.platform(),
        "device": jax.devices()[0].device_kind,
    }


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write the record of a variation as JSON."""
    path.write_text(json.dumps({"format_version": FORMAT_VERSION} | record, indent=2) + "\n")


@dataclasses.dataclass(frozen=True)
class Record:
    """What `--from-params` needs of a record."""

    options: dict[str, Any]
    """Option → value, as they were given or drawn."""
    input: dict[str, str] | None
    """Path and SHA-256 of the input; None if there was none."""
    mask: dict[str, str] | None
    """The same of the mask."""
    model: dict[str, str]
    """Its name, and the fingerprints of its weights."""
    meant: dict[str, Any]
    """What the options meant to the library: "prompt", "coarse" and "fine", where they are said."""


def read_record(path: Path) -> Record:
    """Read what `write_record` wrote.

    Raises:
      InputError: there is no such file, or it is not such a record.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path} is not a JSON file.") from None
    fields = {"options": (dict,), "input": (dict, type(None)), "mask": (dict, type(None))}
    fields["model"] = (dict,)
    if not isinstance(content, dict) or not all(
        isinstance(content.get(name, 0), types) for name, types in fields.items()
    ):
        raise InputError(f"{path} is not the record of a run; give the .json beside a result.")
    if content.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path} has format {content.get('format_version')}; this version reads "
            f"{FORMAT_VERSION}."
        )
    for name in ("input", "mask"):
        file = content[name]
        if file is not None and not all(isinstance(file.get(k), str) for k in ("path", "sha256")):
            raise InputError(f"{path} does not say which {name} it used.")
    meant = {name: content[name] for name in ("prompt", "coarse", "fine") if name in content}
    return Record(**{name: content[name] for name in fields}, meant=meant)


def recorded_file(record_path: Path, file: dict[str, str]) -> Path:
    """The path of an input of an earlier run, if it is still what it was."""
    path = Path(file["path"])
    if not path.is_file():
        raise InputError(f"{path}, which {record_path} was made from, is not there any more.")
    if file_hash(path) != file["sha256"]:
        raise InputError(f"{path} has changed since {record_path} was made from it.")
    return path
