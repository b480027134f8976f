"""Token folders in cloud storage (`gs://`, `s3://` and all else that fsspec reads).

Training reads records at random, which storage of objects is slow at, so a folder is copied once
to the machine's cache folder. What has changed since is copied again.
"""

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from codec_bridge.atomic import atomic_write
from codec_bridge.errors import InputError
from vampnet_jax.devices import cache_folder
from vampnet_jax.training.tokens import CODEBOOKS, HOST_MANIFEST, MANIFEST, read_manifest

COPIED = "copied.json"
"""Name of each file that was copied → what the storage said about it then."""


def is_remote(folder: str | Path) -> bool:
    """Whether this is the address of a folder in some storage, not a path."""
    return "://" in str(folder)


def absolute(folder: str | Path) -> str:
    """The folder as it is called from anywhere."""
    return str(folder) if is_remote(folder) else str(Path(folder).resolve())


def local(folder: str | Path, *, say: Callable[[str], object] = print) -> Path:
    """A token folder as a local one: itself, or its copy, which is brought up to date.

    Processes of one machine share the copy; one copies and the others wait for it.

    Args:
      folder: a path, or an address such as `gs://bucket/tokens`.
      say: hears what is copied.

    Raises:
      InputError: the storage cannot be reached or read, a package for it is missing, it holds no
        token folder, or the cache folder cannot be written to.
    """
    if not is_remote(folder):
        return Path(folder)
    address = str(folder).rstrip("/")
    copy = cache_folder() / "tokens" / hashlib.sha256(address.encode()).hexdigest()[:16]
    try:
        copy.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {copy}: {error.strerror}.") from error
    storage, root = _open(address)
    with _waiting(copy):
        _update(copy, storage, root, address, say)
    return copy


def _open(address: str) -> tuple[Any, str]:
    scheme = address.partition("://")[0]
    try:
        import fsspec

        return fsspec.core.url_to_fs(address)
    except ImportError as error:
        raise InputError(
            f"Reading {scheme}:// needs another package ({error}); install vampnet-jax[cloud], or "
            "the fsspec package of that storage."
        ) from error
    except Exception as error:  # every storage has its own
        raise InputError(f"{address} cannot be opened ({error}).") from error


def _update(
    copy: Path, storage: Any, root: str, address: str, say: Callable[[str], object]
) -> None:
    try:
        found = {
            entry["name"].rstrip("/").rpartition("/")[2]: entry
            for entry in storage.ls(root, detail=True)
        }
    except Exception as error:  # every storage has its own
        raise InputError(f"{address} cannot be listed ({error!r}).") from error
    manifests = [name for name in found if name == MANIFEST or HOST_MANIFEST.fullmatch(name)]
    if not manifests or CODEBOOKS not in found:
        raise InputError(f"{address} is no token folder: it has no {MANIFEST} or {CODEBOOKS}.")
    known = _read_copied(copy)
    for path in copy.iterdir():  # manifests of hosts that were merged, shards that are gone
        if path.name not in {*found, COPIED} and path.suffix in (".json", ".arrayrecord"):
            path.unlink()

    def bring(names: list[str]) -> None:
        stale = {}
        for name in names:
            if name not in found:
                raise InputError(f"{address}/{name} is missing; tokenise again.")
            # What else than the size tells that a file changed differs from storage to storage.
            state = [found[name]["size"], str(storage.ukey(found[name]["name"]))]
            if known.get(name) != state or not (copy / name).is_file():
                stale[name] = state
        if stale:
            size = sum(state[0] for state in stale.values())
            say(f"copying {len(stale)} files, {size / 1e9:.2f} GB, from {address} to {copy}")
        for name, state in stale.items():
            known.pop(name, None)
            with atomic_write(copy / name) as path:
                try:
                    storage.get_file(found[name]["name"], str(path))
                except Exception as error:
                    raise InputError(f"{address}/{name} cannot be copied ({error!r}).") from error
                if path.stat().st_size != state[0]:
                    raise InputError(f"{address}/{name} changed while it was copied; repeat this.")
            known[name] = state
            with atomic_write(copy / COPIED) as path:
                path.write_text(json.dumps(known, indent=1))

    bring([*manifests, CODEBOOKS])
    bring(sorted({track.shard for track in read_manifest(copy).tracks}))


def _read_copied(copy: Path) -> dict[str, Any]:
    try:
        known = json.loads((copy / COPIED).read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


@contextlib.contextmanager
def _waiting(copy: Path) -> Iterator[None]:
    """Wait until no other process copies."""
    with open(copy / ".lock", "w") as lock:
        with contextlib.suppress(OSError):  # a file system without locks: each copies
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
