"""`vampnet merge-lora`: a model with the adapters that LoRA runs trained."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg

from codec_bridge.errors import InputError


@dataclasses.dataclass(frozen=True)
class MergeOptions:
    """Make a model directory of a model and of what `vampnet train --lora-from` trained of it."""

    paths: Annotated[tuple[str, ...], Positional, arg(metavar="MODEL RUN... OUT_DIR")]
    """The model that was adapted, the folders of the runs (a coarse one, a fine one or both), and
    the model directory to write."""
    keep_lora: bool = False
    """Keep the adapters in files of their own instead of merging them into the weights."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """How weights are stored; bfloat16 halves the files and rounds the weights."""
    name: str | None = None
    """The model's name; the directory's, if left out."""
    overwrite: bool = False
    """Replace an existing model directory."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = tyro.cli(
        MergeOptions, prog="vampnet merge-lora", args=argv, config=(FlagCreatePairsOff,)
    )
    if len(options.paths) < 3:
        raise InputError("Give the model, one or two LoRA runs of it, and the directory to write.")
    try:
        from vampnet_jax.importing import merge_lora
        from vampnet_jax.training import checkpoints  # noqa: F401 (is the extra installed?)
    except ImportError as error:
        raise InputError(
            f"Reading a training run needs the package {error.name}; install vampnet-jax[train]."
        ) from error

    model, *runs, out = options.paths
    merge_lora(
        model,
        runs,
        Path(out),
        keep_lora=options.keep_lora,
        dtype=options.dtype,
        name=options.name or "unnamed",
        overwrite=options.overwrite,
    )
    print(f"wrote {out}")
    return 0
