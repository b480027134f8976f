"""`vampnet evaluate`: the paper's experiments, and one's own, on a folder of recordings."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, UseAppendAction, arg

from codec_bridge.errors import InputError
from vampnet_jax.cli.compress import require_constriction
from vampnet_jax.cli.naming import named_as_options
from vampnet_jax.devices import Device


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """Measure how good a model is, on recordings that it has not learnt from.

    Run it again to continue after an interruption, or to add experiments.
    """

    audio: Annotated[Path, Positional, arg(metavar="AUDIO_DIR")]
    """A folder of recordings."""
    out: Annotated[Path, arg(aliases=["-o"])]
    """The folder for results: report.html, results.csv, results.json, plots, audio."""
    model: str = "tiny"
    """A model's name or directory."""
    experiment: UseAppendAction[tuple[Literal["prompts", "steps", "compression"], ...]] = ()
    """One of the paper's experiments; repeat for more (default: all, if there is no --config)."""
    config: Path | None = None
    """A YAML file of your own experiments."""
    excerpts: int = 100
    """How many excerpts; as many others are the reference of Fréchet and kernel distances. None
    overlap."""
    seconds: float = 10.0
    """Length of each."""
    embedding: UseAppendAction[tuple[Literal["mel-statistics", "crepe-tiny", "clap"], ...]] = ()
    """What Fréchet and kernel distances are taken in; repeat for more (default: mel-statistics;
    crepe-tiny needs the extra `evaluate`)."""
    listen: int = 2
    """Recordings of every condition to keep for listening."""
    seed: int = 0
    """Of everything that is drawn."""
    device: Device = "auto"
    """Where the model computes."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = tyro.cli(EvaluateOptions, prog="vampnet evaluate", args=argv)
    for name, least in (("excerpts", 2), ("seconds", 0.5), ("listen", 0), ("seed", 0)):
        value = getattr(options, name)
        if not least <= value < 2**32:
            raise InputError(f"--{name} is {value:g}; it must be from {least} to {2**32 - 1}.")
    if not options.audio.is_dir():
        raise InputError(f"{options.audio} is not a folder of recordings.")
    require_constriction()
    from vampnet_jax import devices
    from vampnet_jax.cli.progress import StageBars
    from vampnet_jax.cli.results import run_interruptibly
    from vampnet_jax.compression.compressor import Compressor
    from vampnet_jax.evaluation.conditions import baselines, paper_experiments, read_experiments
    from vampnet_jax.evaluation.run import evaluate

    own = read_experiments(options.config) if options.config is not None else {}

    def work() -> None:
        devices.keep_compiled_programs()
        with named_as_options(subjects=("device",)):
            devices.select(options.device)
        codec_device = devices.of_codec(options.device)
        compressor = Compressor.load(options.model, codec_device=codec_device)
        n_coarse = compressor.model.coarse.config.n_codebooks
        paper = paper_experiments(n_coarse, compressor.n_codebooks)
        chosen = options.experiment if options.experiment or own else tuple(paper)
        if both := sorted(own.keys() & set(chosen)):
            raise InputError(
                f"{options.config} has an experiment {both[0]!r}, and so has --experiment; rename "
                "the first or leave out the second."
            )
        conditions = baselines() + [c for name in chosen for c in paper[name]]
        conditions += [c for rows in own.values() for c in rows]
        with StageBars() as bars:
            results = evaluate(
                compressor, options.audio, options.out, conditions,
                n_excerpts=options.excerpts, seconds=options.seconds,
                embeddings=tuple(dict.fromkeys(options.embedding)) or ("mel-statistics",),
                seed=options.seed, n_listen=options.listen, on_progress=bars,
            )  # fmt: skip
        for result in results:
            mel = result.figures["mel"]
            name = f"{result.condition.experiment}, {result.condition.name}"
            print(f"{name:<40} mel {mel.value:.3f} [{mel.low:.3f}, {mel.high:.3f}]")
        print(options.out / "report.html")

    run_interruptibly(work, lambda: None)
    return 0
