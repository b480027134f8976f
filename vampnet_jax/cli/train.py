"""`vampnet train`: train a coarse or fine model from a folder of tokens."""

import dataclasses
import importlib.metadata
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg

from codec_bridge.errors import InputError

if TYPE_CHECKING:
    from vampnet_jax.training.config import TrainConfig
    from vampnet_jax.training.loop import TrainingData

STOPPED = 130
"""Exit status after Ctrl-C or SIGTERM, the state being saved."""
MAY_CHANGE = {
    "steps",
    "minutes",
    "log_every",
    "validate_every",
    "validation_excerpts",
    "save_minutes",
    "keep",
}
"""Options that a resumed run takes; all others are those that it began with."""


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Train a coarse or fine model from a folder of tokens that `vampnet tokenize` made.

    What is not given comes from the preset. Ctrl-C saves and stops; --resume continues exactly.
    """

    out: Path
    """Folder of the run: configuration, checkpoints, logs."""
    data: Annotated[Path | None, Positional, arg(metavar="TOKENS")] = None
    """Folder of tokens (with --resume: that of the run unless given)."""
    stage: Literal["coarse", "fine"] | None = None
    """Coarse predicts the first codebooks, fine the rest (default: what the preset is for)."""
    preset: Literal["tiny", "coarse", "fine"] = "tiny"
    """tiny trains on a laptop; coarse and fine are the published models."""
    resume: bool = False
    """Continue the run in --out."""
    seed: int | None = None
    """Decides everything random (default: drawn, shown, saved)."""
    steps: int | None = None
    """Stop after so many steps."""
    minutes: float | None = None
    """Stop after so many minutes; the cosine schedule then follows time."""
    batch_size: int | None = None
    """Excerpts per step."""
    window_seconds: float | None = None
    """Seconds per excerpt."""
    min_loudness: float | None = None
    """LUFS; quieter excerpts are drawn again."""
    schedule: Literal["noam", "cosine", "constant"] | None = None
    """How the learning rate changes."""
    learning_rate: float | None = None
    """Peak of cosine and constant; factor of noam."""
    warmup_steps: int | None = None
    """Steps in which the learning rate rises."""
    weight_decay: float | None = None
    """Decoupled weight decay."""
    gradient_clip: float | None = None
    """Largest global norm of the gradient."""
    label_smoothing: float | None = None
    """Share of the target spread over all codes."""
    ema_decay: float | None = None
    """Of the moving average of the weights; 0 keeps none."""
    n_codebooks: int | None = None
    """Codebooks that the model reads."""
    n_conditioning_codebooks: int | None = None
    """Codebooks of them that are given, not predicted."""
    n_layers: int | None = None
    """Transformer blocks."""
    n_heads: int | None = None
    """Attention heads."""
    embedding_dim: int | None = None
    """Width of the transformer."""
    dropout: float | None = None
    """Share of activations dropped."""
    remat: bool = False
    """Recompute blocks in the backward pass: less memory, more time."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """What matrix products compute in."""
    attention: Literal["xla", "cudnn"] | None = None
    """Attention kernel."""
    log_every: int | None = None
    """Steps between lines of the log."""
    validate_every: int | None = None
    """Steps between validations; each saves a checkpoint."""
    validation_excerpts: int | None = None
    """Excerpts that are validated on."""
    save_minutes: float | None = None
    """Save after so many minutes without a checkpoint."""
    keep: int | None = None
    """Newest checkpoints kept, besides the best."""


NOT_SETTINGS = {"out", "data", "stage", "preset", "resume"}


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = tyro.cli(
        TrainOptions,
        prog="vampnet train",
        args=argv,
        config=(FlagCreatePairsOff,),
    )
    settings = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options)
        if field.name not in NOT_SETTINGS
    }
    settings["remat"] = options.remat or None  # not given: as the preset or the run has it
    try:
        from vampnet_jax.training import loop
    except ImportError as error:
        raise InputError(
            f"Training needs the package {error.name}; install vampnet-jax[train]."
        ) from error
    from rich.console import Console

    begin = _resumed if options.resume else _new
    config, data = begin(options, settings)
    finished = loop.train(config, data, options.out, Console())
    return 0 if finished else STOPPED


def _new(options: TrainOptions, settings: dict[str, Any]) -> "tuple[TrainConfig, TrainingData]":
    """Resolve the settings of a new run, check its data and make its folder."""
    from vampnet_jax.training import checkpoints
    from vampnet_jax.training.config import preset_config
    from vampnet_jax.training.loop import open_data
    from vampnet_jax.training.tokens import read_codebooks, read_manifest

    if options.data is None:
        raise InputError("Give the folder of tokens to train from.")
    if (options.out / checkpoints.CONFIG).exists():
        raise InputError(
            f"{options.out} already holds a run; add --resume to continue it, or choose another "
            "folder with --out."
        )
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise InputError(f"{options.out} is not empty; choose another folder with --out.")
    manifest = read_manifest(options.data)
    codebooks = read_codebooks(options.data, manifest.codec)
    if settings["seed"] is None:
        settings["seed"] = secrets.randbelow(2**31)
    stage = options.stage or ("fine" if options.preset == "fine" else "coarse")
    config = preset_config(
        options.preset,
        stage,
        settings,
        codec_codebooks=manifest.codec.n_codebooks,
        codebook_size=manifest.codec.codebook_size,
        latent_dim=codebooks.shape[2],
    )
    data = open_data(config, options.data)
    packages = ("vampnet-jax", "jax", "flax", "optax", "orbax-checkpoint", "grain")
    facts = {
        "stage": stage,
        "preset": options.preset,
        "data": str(options.data.resolve()),
        "codec": dataclasses.asdict(manifest.codec),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {options.out}: {error.strerror}") from error
    checkpoints.write_run(options.out, config, facts)
    return config, data


def _resumed(options: TrainOptions, settings: dict[str, Any]) -> "tuple[TrainConfig, TrainingData]":
    """The settings of an existing run, with the few that may change."""
    from vampnet_jax.training.checkpoints import read_run, write_run
    from vampnet_jax.training.loop import open_data

    config, facts = read_run(options.out)
    given = {name: value for name, value in settings.items() if value is not None}
    known = config.to_dict()
    known |= known.pop("model")
    for name, value in given.items():
        if name not in MAY_CHANGE and known[name] != value:
            raise InputError(
                f"{options.out} was begun with {name} {known[name]}; a resumed run cannot change "
                f"it to {value}."
            )
    if options.stage not in (None, facts.get("stage")):
        raise InputError(f"{options.out} trains the {facts.get('stage')} stage.")
    changes = {name: value for name, value in given.items() if name in MAY_CHANGE}
    config = dataclasses.replace(config, **changes)
    folder = options.data or Path(str(facts.get("data")))
    data = open_data(config, folder)
    if data.manifest.codec.fingerprint != facts.get("codec", {}).get("fingerprint"):
        raise InputError(
            f"{options.out} was trained with another codec than that of the tokens in {folder}."
        )
    write_run(options.out, config, facts | {"data": str(folder.resolve())})
    return config, data
