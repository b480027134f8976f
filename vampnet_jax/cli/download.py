"""`vampnet download`: fetch the original's published weights."""

import dataclasses
from typing import Annotated

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg


@dataclasses.dataclass(frozen=True)
class DownloadOptions:
    """Fetch the original's published weights from the Hugging Face hub and convert them, once."""

    name: Annotated[str, Positional, arg(metavar="NAME")] = "official"
    """official, or official:NAME for the fine-tune under loras/NAME/ on the hub."""
    revision: str | None = None
    """Branch, tag or commit on the hub; the commit of the first download, if left out."""
    overwrite: bool = False
    """Fetch what changed and convert again."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = tyro.cli(
        DownloadOptions, prog="vampnet download", args=argv, config=(FlagCreatePairsOff,)
    )
    from vampnet_jax.download import download

    directory = download(options.name, revision=options.revision, overwrite=options.overwrite)
    print(f"ready: {directory} (use it as --model {options.name})")
    return 0
