"""The audio files of a folder: their names as tracks, their sources and splits."""

import dataclasses
import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path

from codec_bridge.errors import InputError
from vampnet_jax.training.tokens import SPLITS

EXTENSIONS = re.compile(r"\.(wav|flac|og[ga]|opus|mp3|aif[fc]?|au|w64)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class AudioFile:
    """One track to be."""

    path: Path
    name: str
    """Source, then the path below it without its extension."""
    source: str
    split: str | None = None

    @functools.cached_property
    def stamp(self) -> tuple[int, int]:
        """Size in bytes and time of change in seconds, when first asked for: before it is read."""
        status = self.path.stat()
        return status.st_size, int(status.st_mtime)


def find_audio(paths: Sequence[Path]) -> list[AudioFile]:
    """The audio files among `paths` and below its folders, in the order of their names.

    A file below a folder is called by its path there without extension, and its first folder is
    its source; a file directly in a folder, or given itself, has that folder as its source.

    Raises:
      InputError: a path does not exist, there is no audio, or two files would have one name.
    """
    found: dict[str, AudioFile] = {}
    for path in paths:
        if not path.exists():
            raise InputError(f"{path} does not exist.")
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if EXTENSIONS.fullmatch(file.suffix))
            pairs = [(file, file.relative_to(path)) for file in files if _is_visible(file, path)]
        else:
            pairs = [(path, Path(path.name))]
        top = (path if path.is_dir() else path.absolute().parent).resolve().name or "audio"
        for file, relative in pairs:
            if len(relative.parts) == 1:
                relative = top / relative
            track = AudioFile(file, relative.with_suffix("").as_posix(), relative.parts[0])
            if found.setdefault(track.name, track).path.resolve() != file.resolve():
                raise InputError(
                    f"{found[track.name].path} and {file} would both be track {track.name!r}; "
                    "rename one or tokenise them into separate folders."
                )
    if not found:
        raise InputError(f"There is no audio in {', '.join(map(str, paths))}.")
    return [found[name] for name in sorted(found)]


def _is_visible(file: Path, folder: Path) -> bool:
    return file.is_file() and not any(p.startswith(".") for p in file.relative_to(folder).parts)


def assign_splits(
    files: Sequence[AudioFile], split_file: Path
) -> tuple[list[AudioFile], list[str], list[str]]:
    """Give each file its split from a JSON file `{"train": [names], "validation": …, "test": …}`.

    Returns:
      The files that the JSON names, the names of the others, which are left out, and the names in
      the JSON that no file has.

    Raises:
      InputError: the file cannot be read, or names no file or one twice.
    """
    try:
        content = json.loads(split_file.read_text(encoding="utf-8"))
        splits = {name: split for split in content for name in content[split]}
        count = sum(len(names) for names in content.values())
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{split_file} is not a JSON of splits and names: {error}.") from error
    unknown = set(content) - set(SPLITS)
    if unknown:
        raise InputError(f"{split_file} has split {min(unknown)!r}; use {', '.join(SPLITS)}.")
    if count != len(splits):
        raise InputError(f"{split_file} names a track twice.")
    named = [dataclasses.replace(f, split=splits[f.name]) for f in files if f.name in splits]
    if not named:
        raise InputError(
            f"{split_file} names none of the {len(files)} tracks, for example {files[0].name!r}."
        )
    names = {file.name for file in files}
    left_out = [file.name for file in files if file.name not in splits]
    return named, left_out, [name for name in splits if name not in names]
