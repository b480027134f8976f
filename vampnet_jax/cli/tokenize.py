"""`vampnet tokenize`: audio files to a folder of tokens."""

import dataclasses
import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import Positional, arg

from codec_bridge.errors import InputError
from vampnet_jax.cli.naming import named_as_options

if TYPE_CHECKING:
    from codec_bridge import Codec


@dataclasses.dataclass(frozen=True)
class TokenizeOptions:
    """Turn audio files into a folder of tokens to train from.

    Run it again to continue, or to add files: what is there and has not changed is left alone.
    """

    paths: Annotated[tuple[Path, ...], Positional, arg(metavar="AUDIO... OUT")]
    """Audio files and folders, and last the folder to write."""
    model: str = "tiny"
    """The model whose codec makes the tokens."""
    codec: str | None = None
    """A codec file instead, or the name of a codec or model."""
    split: Literal["train", "validation", "test"] | None = None
    """What these files are for (without any split, training holds out one track in twenty)."""
    split_file: Path | None = None
    """JSON that lists the names of tracks by split; files that it does not name are left out."""
    workers: int = min(8, os.cpu_count() or 1)
    """Processes that encode; each loads PyTorch and the codec."""
    shard: str | None = None
    """Encode one share of the files: 2/4 is the second of four, auto asks Slurm, Open MPI, a TPU
    pod or JAX_PROCESS_ID. All hosts write into one folder, at once or one after another."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = tyro.cli(TokenizeOptions, prog="vampnet tokenize", args=argv)
    if len(options.paths) < 2:
        raise InputError("Give audio files or folders, then the folder to write.")
    if options.workers < 1:
        raise InputError(f"--workers is {options.workers}; it must be at least 1.")
    if options.split and options.split_file:
        raise InputError("Give --split or --split-file, not both.")
    try:
        from vampnet_jax.training import audio_files, hosts, tokenising
    except ImportError as error:
        raise InputError(
            f"Tokenising needs the package {error.name}; install vampnet-jax[train]."
        ) from error
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    *inputs, out = options.paths
    console = Console()
    with named_as_options(subjects=("shard",)):
        host = hosts.parse_host(options.shard, os.environ) if options.shard else None
    files = audio_files.find_audio(inputs)
    if options.split_file:
        files, left_out, missing = audio_files.assign_splits(files, options.split_file)
        if left_out:
            text = f"{len(left_out)} files are in no split: left out, for example {left_out[0]}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)
        if missing:
            text = f"{len(missing)} names of the split file have no file, for example {missing[0]}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)
    elif options.split:
        files = [dataclasses.replace(file, split=options.split) for file in files]
    load = functools.partial(_load_codec, options.model, options.codec)
    columns = ("tokenising", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("tokenising")
        outcome = tokenising.tokenise(
            files,
            out,
            load,
            workers=options.workers,
            host=host,
            report=lambda done, total: progress.update(task, completed=done, total=total),
        )
    tracks = outcome.manifest.tracks
    hours = sum(track.seconds for track in tracks) / 3600
    share = f", share {host.number} of {host.count}" if host else ""
    console.print(
        f"{out}{share}: {len(tracks)} tracks, {hours:.2f} h ({outcome.encoded} new, "
        f"{outcome.unchanged} unchanged, {len(outcome.skipped)} skipped)",
        markup=False,
        soft_wrap=True,
    )
    for path, problem in outcome.skipped.items():
        text = f"skipped {path}: {problem}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    return 0


def _load_codec(model: str, codec: str | None) -> "Codec":
    """The codec of a model, or one by itself; a function of this module, so picklable."""
    from vampnet_jax.release import find_codec, load_codec

    return load_codec(model) if codec is None else find_codec(codec)
