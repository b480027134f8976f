"""The original's published weights: fetched from the Hugging Face hub, converted once, kept.

What is fetched is pinned: the commit and the SHA-256 of every file are recorded at the first
download, and later downloads must find the same.
"""

import dataclasses
import errno
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codec_bridge.atomic import atomic_write
from codec_bridge.errors import InputError
from codec_bridge.hashes import file_hash
from vampnet_jax.devices import cache_folder

if TYPE_CHECKING:
    from vampnet_jax.importing import Source

REPOSITORY = "hugggof/vampnet"
BRANCH = "main"
LICENCE = "CC BY-NC-SA 4.0"
LICENCE_NOTE = (
    f"The weights of {REPOSITORY} are licensed {LICENCE}: name the authors, no commercial use, "
    "share changes under the same licence (https://creativecommons.org/licenses/by-nc-sa/4.0/)."
)
STAGES = {"coarse": "coarse", "fine": "c2f"}
"""Stage → name of its files on the hub."""


def download(
    name: str = "official",
    *,
    revision: str | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Fetch and convert the official model or one of its fine-tunes, unless that was done before.

    Interrupted downloads continue where they stopped.

    Args:
      name: "official", or "official:NAME" for a fine-tune under `loras/NAME/` on the hub.
      revision: branch, tag or commit on the hub; None for the commit of the first download, or
        the newest if there was none.
      overwrite: convert again, replacing what was converted before.
      say: is told the licence and what happens.

    Returns:
      The model directory, which `vampnet_jax.load(name)` finds too.

    Raises:
      InputError: no such name or revision, no connection, or files that are not those of the
        first download.
    """
    from vampnet_jax.importing import import_model

    directory, record = _directory(name), _read_record()
    say(LICENCE_NOTE)
    converted = record["models"].get(name)
    if directory.is_dir() and converted is not None and not overwrite:
        if revision not in (None, converted["revision"], converted["commit"]):
            raise InputError(
                f"{name} is here at revision {converted['revision']} ({converted['commit']}); add "
                f"--overwrite to replace it with {revision}."
            )
        _verify(directory, converted["files"])
        say(f"{name} is already here: {directory}")
        return directory
    wanted = revision or record["commit"] or BRANCH
    commit, on_hub = _list(wanted)
    files = _Files(commit, on_hub, record["files"].get(commit, {}))
    stages = {stage: _source(name, stage, files) for stage in STAGES}
    codec = files.fetch("codec.pth")
    if record["commit"] is None or revision is not None:
        record["commit"] = commit
    record["files"].setdefault(commit, {}).update(files.hashes)
    _write_record(record)  # before anything is made of them

    say(f"converting to {directory}")
    card = _card(name, commit, files.hashes)
    import_model(
        stages["coarse"], stages["fine"], codec, directory, name=name, card=card, overwrite=True
    )
    made = {path.name: file_hash(path) for path in sorted(directory.iterdir())}
    record["models"][name] = {"revision": wanted, "commit": commit, "files": made}
    _write_record(record)
    return directory


def downloaded(name: str) -> Path:
    """The directory of a downloaded model.

    Raises:
      InputError: it was not downloaded yet.
    """
    directory = _directory(name)
    if not directory.is_dir():
        raise InputError(f"{name} is not here yet; fetch it with: vampnet download {name}")
    return directory


def _directory(name: str) -> Path:
    if not re.fullmatch(r"official(:[A-Za-z0-9_][A-Za-z0-9_. -]*)?", name):
        raise InputError(
            f"There is no {name!r} to download; give official, or official:NAME for a fine-tune."
        )
    return cache_folder() / "models" / name.replace(":", "--")


def _list(revision: str) -> tuple[str, dict[str, str | None]]:
    """The commit of a revision and its files, with their SHA-256 where the hub knows it."""
    import huggingface_hub

    try:
        info = huggingface_hub.HfApi().model_info(
            REPOSITORY, revision=revision, files_metadata=True
        )
    except Exception as error:
        raise _explained(error, f"revision {revision}") from error
    files = {file.rfilename: file.lfs.sha256 if file.lfs else None for file in info.siblings or ()}
    return str(info.sha), files


@dataclasses.dataclass
class _Files:
    """The hub's files at one commit, checked against every hash that is known of them."""

    commit: str
    on_hub: Mapping[str, str | None]
    recorded: Mapping[str, str]
    hashes: dict[str, str] = dataclasses.field(default_factory=dict)
    """SHA-256 of what was fetched."""

    def fetch(self, file: str) -> Path:
        import huggingface_hub

        if file not in self.on_hub:
            raise InputError(f"{REPOSITORY} has no {file} at commit {self.commit}.")
        try:
            path = huggingface_hub.hf_hub_download(REPOSITORY, file, revision=self.commit)
        except Exception as error:
            raise _explained(error, file) from error
        found = file_hash(path)
        for source, wanted in (
            ("the first download had", self.recorded.get(file)),
            ("the hub names", self.on_hub[file]),
        ):
            if wanted not in (None, found):
                raise InputError(
                    f"{file} of commit {self.commit} has SHA-256 {found}, but {source} {wanted}; "
                    f"nothing was converted. Delete {path} to fetch it again."
                )
        self.hashes[file] = found
        return Path(path)


def _source(name: str, stage: str, files: _Files) -> "Source":
    """Fetch one stage: the official file, a fine-tune's own, or both."""
    from codec_bridge.pth import read_pth
    from vampnet_jax.importing import Source

    stem = STAGES[stage]
    fine_tune = name.partition(":")[2]
    if not fine_tune:
        return Source(files.fetch(f"{stem}.pth"))
    names = {match[1] for file in files.on_hub if (match := re.match("loras/([^/]+)/", file))}
    if fine_tune not in names:
        raise InputError(
            f"{REPOSITORY} has no fine-tune {fine_tune!r}; choose one of: "
            f"{', '.join(sorted(names)) or 'none'}."
        )
    for file in (f"loras/{fine_tune}/{stem}.pth", f"loras/{fine_tune}/{stem}/lora.pth"):
        if file in files.on_hub:
            path = files.fetch(file)
            if "kwargs" in read_pth(path)["metadata"]:  # all weights, not adapters alone
                return Source(path)
            return Source(files.fetch(f"{stem}.pth"), path)
    return Source(files.fetch(f"{stem}.pth"))


def _explained(error: Exception, what: str) -> Exception:
    """The hub client's failure as a sentence; errors of the program itself stay as they are."""
    from huggingface_hub import errors

    not_there = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)
    if isinstance(error, (*not_there, errors.RemoteEntryNotFoundError)):
        return InputError(f"{REPOSITORY} on the Hugging Face hub has no {what}.")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return InputError("The disk is full; make room and run the command again to continue.")
    if isinstance(error, OSError | errors.HTTPError):
        return InputError(
            f"{what} could not be fetched from the Hugging Face hub ({error}); is this machine "
            "online? Files fetched elsewhere can be converted with: vampnet import"
        )
    return error


def _card(name: str, commit: str, hashes: Mapping[str, str]) -> str:
    lines = [f"- `{file}`, SHA-256 `{digest}`" for file, digest in hashes.items()]
    return "\n".join(
        [
            f"# {name}",
            "",
            "Weights of VampNet by Hugo Flores García, Prem Seetharaman, Rithesh Kumar and Bryan",
            "Pardo (VampNet: Music Generation via Masked Acoustic Token Modeling, ISMIR 2023),",
            "converted by vampnet-jax without other changes than merging LoRA adapters.",
            "",
            f"Licence: {LICENCE}. {LICENCE_NOTE}",
            "",
            f"Source: `{REPOSITORY}` on the Hugging Face hub, commit `{commit}`:",
            "",
            *lines,
            "",
        ]
    )


def _verify(directory: Path, recorded: Mapping[str, str]) -> None:
    for file, wanted in recorded.items():
        path = directory / file
        if not path.is_file() or file_hash(path) != wanted:
            raise InputError(
                f"{path} is not what was converted; add --overwrite to fetch and convert it again."
            )


def _record_path() -> Path:
    return cache_folder() / "models" / "downloads.json"


def _read_record() -> dict[str, Any]:
    """Pinned commit, hashes of fetched files by commit, and what was converted."""
    path = _record_path()
    empty: dict[str, Any] = {"commit": None, "files": {}, "models": {}}
    if not path.exists():
        return empty
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.keys() != empty.keys():
            raise ValueError("other keys")
        return record
    except (OSError, ValueError, AttributeError):
        raise InputError(
            f"{path} is damaged; delete it to forget the hashes of earlier downloads."
        ) from None


def _write_record(record: Mapping[str, Any]) -> None:
    path = _record_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path.parent} cannot be made: {error.strerror or error}.") from None
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
