"""`vampnet export-torch`: write a model as the original's .pth files."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """Write a model as coarse.pth, c2f.pth and codec.pth, which the original VampNet loads."""

    model: Annotated[str, Positional, arg(metavar="MODEL")]
    """A model directory or name."""
    out: Annotated[Path, Positional, arg(metavar="OUT_DIR")]
    """The folder to write the files to."""
    overwrite: bool = False
    """Replace files that exist."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = tyro.cli(
        ExportOptions, prog="vampnet export-torch", args=argv, config=(FlagCreatePairsOff,)
    )
    from vampnet_jax.exporting import export_torch

    export_torch(options.model, options.out, overwrite=options.overwrite)
    print(f"wrote {options.out}/coarse.pth, c2f.pth and codec.pth")
    return 0
