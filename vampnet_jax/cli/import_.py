"""`vampnet import`: make a model directory from checkpoints or training runs."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg

from codec_bridge.errors import InputError


@dataclasses.dataclass(frozen=True)
class ImportOptions:
    """Make a model directory from a coarse model, a fine model and their codec."""

    directory: Annotated[Path, Positional, arg(metavar="OUT_DIR")]
    """The model directory to write."""
    coarse: Path
    """The coarse model: a .pth of the original VampNet, or the folder of a training run."""
    fine: Path
    """The fine (coarse-to-fine) model, likewise."""
    codec: str
    """The codec of both: a codec file, or the name of released weights (44khz) or model (tiny)."""
    coarse_lora: Path | None = None
    """A fine-tune's lora.pth for the coarse model."""
    fine_lora: Path | None = None
    """A fine-tune's lora.pth for the fine model."""
    keep_lora: bool = False
    """Keep LoRA adapters in files of their own instead of merging them into the weights."""
    coarse_window: float | None = None
    """Seconds that the coarse model reads at once; its training run's, or 10, if left out."""
    fine_window: float | None = None
    """Seconds that the fine model reads at once; its training run's, or 3, if left out."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """How weights are stored; bfloat16 halves the files and rounds the weights."""
    name: str | None = None
    """The model's name; the directory's, if left out."""
    card: Path | None = None
    """A Markdown file to put in as the model card; one that names the sources, if left out."""
    overwrite: bool = False
    """Replace an existing model directory."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = tyro.cli(
        ImportOptions, prog="vampnet import", args=argv, config=(FlagCreatePairsOff,)
    )
    from vampnet_jax.importing import Source, import_model

    import_model(
        Source(options.coarse, options.coarse_lora, options.coarse_window),
        Source(options.fine, options.fine_lora, options.fine_window),
        options.codec,
        options.directory,
        keep_lora=options.keep_lora,
        dtype=options.dtype,
        name=options.name or "unnamed",
        card=None if options.card is None else _read(options.card),
        overwrite=options.overwrite,
    )
    print(f"wrote {options.directory}")
    return 0


def _read(card: Path) -> str:
    try:
        return card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{card} cannot be read as a model card ({error}).") from None
