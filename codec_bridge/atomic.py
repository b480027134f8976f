"""Write files whole or not at all."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from codec_bridge.errors import InputError


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], *, overwrite: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path` and rename it to `path` when the block succeeds.

    The temporary name ends like `path`, so that writers which go by the extension work. If the
    block fails or is interrupted, nothing is left behind and what was at `path` stays.

    Raises:
      InputError: the folder is missing or not writable, `path` is a directory, or it exists and
        `overwrite` is false.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a directory; give the name of a file to write")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists already; choose another name or allow overwriting")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: the folder {path.parent} does not exist")
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        # Created here, so that a folder that cannot be written to is found out before the work.
        with open(temporary, "xb"):
            mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # some writers put a private file of their own in its place
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
