"""`vampnet train`: train a coarse or fine model from a folder of tokens."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, UseAppendAction, arg

from codec_bridge.errors import InputError
from vampnet_jax.cli.naming import named_as_options
from vampnet_jax.cli.status import FAILED_CHECK, INTERRUPTED, OK, TRY_AGAIN, loading

LoraTarget = Literal["query", "key", "value", "out", "up", "down"]


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Train a coarse or fine model from a folder of tokens that `vampnet tokenize` made.

    What is not given comes from the preset. Ctrl-C and SIGTERM save and stop; the same command
    again continues exactly.
    """

    out: Path | None = None
    """Folder of the run: configuration, checkpoints, logs."""
    data: Annotated[str | None, Positional, arg(metavar="TOKENS")] = None
    """Folder of tokens, or an address such as gs://bucket/tokens (not needed to continue a run)."""
    stage: Literal["coarse", "fine"] | None = None
    """Coarse predicts the first codebooks, fine the rest (default: what the preset is for)."""
    preset: Literal["tiny", "small", "base", "coarse", "fine"] | None = None
    """tiny (if none is given) trains on a laptop; coarse and fine are the published models; small
    and base lie between."""
    resume: bool = False
    """Only continue the run in --out: refuse to begin one."""
    new: bool = False
    """Only begin a run: refuse to continue one that is in --out."""
    init_from: str | None = None
    """Begin with the weights of a run (its folder) or of a model (a directory or a name)."""
    lora_from: str | None = None
    """Train LoRA adapters of a model (a directory or a name) or a run, which stays as it is."""
    lora_rank: int | None = None
    """Width of the adapters (default: 8)."""
    lora_alpha: float | None = None
    """Adapters are scaled by alpha / rank (default: 1)."""
    lora_targets: tuple[LoraTarget, ...] | None = None
    """Weights that are adapted (default: all but key)."""
    source_weight: Annotated[tuple[str, ...], UseAppendAction] = ()
    """NAME=2.0: the music of this source comes twice as often as by its length; may be repeated."""
    seed: int | None = None
    """Decides everything random (default: drawn, shown, saved)."""
    steps: int | None = None
    """Stop after so many steps."""
    minutes: float | None = None
    """Stop after so many minutes; the cosine schedule then follows time."""
    batch_size: int | None = None
    """Excerpts per step, over all devices."""
    accumulate: int | None = None
    """Equal parts that a batch is computed in, one after the other: less memory, the same step."""
    mesh: str | None = None
    """How many devices divide what, such as data=2,fsdp=4,tensor=1; what is left out is chosen."""
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
    adam_b1: float | None = None
    """Decay of the mean of gradients."""
    adam_b2: float | None = None
    """Decay of the mean of squared gradients."""
    gradient_clip: float | None = None
    """Largest global norm of the gradient."""
    skip_spikes: float | None = None
    """Skip steps whose gradient is not finite or so many times as large as usual; 0: none."""
    level_masks: float | None = None
    """Share of examples masked codebook by codebook (SoundStorm)."""
    prompt_masks: float | None = None
    """Share of examples masked between kept frames, as periodic prompts leave them."""
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
    remat: Literal["none", "attention", "dots", "full"] | None = None
    """What the backward pass computes again: the more, the less memory and the more time."""
    dtype: Literal["float32", "bfloat16", "bfloat16-products"] | None = None
    """What matrix products compute in; bfloat16-products is for CPUs with instructions for it."""
    attention: Literal["xla", "cudnn"] | None = None
    """Attention kernel."""
    log_every: int | None = None
    """Steps between lines of the log."""
    validate_every: int | None = None
    """Steps between validations; each saves a checkpoint."""
    validation_excerpts: int | None = None
    """Excerpts that are validated on."""
    save_every: int | None = None
    """Save every so many steps, besides after validations; 0: not."""
    save_minutes: float | None = None
    """Save after so many minutes without a checkpoint."""
    keep: int | None = None
    """Newest checkpoints kept, besides the best and the milestones."""
    milestone_every: int | None = None
    """Save every so many steps and keep for good; 0: not."""
    listen_every: int | None = None
    """Steps between sounds and pictures in TensorBoard; 0: none. Needs --codec."""
    codec: str | None = None
    """To listen with: a codec file, or a model whose codec made the tokens."""
    fine_model: str | None = None
    """For listening to a coarse run: a fine run, or a model, that adds the other codebooks."""
    compile_only: bool = False
    """Compile the step for the TPU pod of --topology, here, and say whether it fits (exit status 1:
    it does not). Needs no TPU, no --out, and no TOKENS: without, the published codec's sizes. With
    --lora-rank and no --lora-from, adapters of the preset's model."""
    topology: str | None = None
    """For --compile-only: v5e, v5p or v6e and its shape, such as v5p:8x8x4 (default: v5e:16x16)."""


ASKED = (
    "out",
    "data",
    "stage",
    "preset",
    "resume",
    "new",
    "init_from",
    "lora_from",
    "codec",
    "fine_model",
    "mesh",
)
"""Options that are no settings of the training but say which run is meant, and from what."""
DEFAULT_TOPOLOGY = "v5e:16x16"
LORA = ("lora_rank", "lora_alpha", "lora_targets")
PATHS = {"out", "data", "codec"}
"""Of which errors give the value, which may be the same word."""
NOT_SETTINGS = {*ASKED, *LORA, "source_weight", "compile_only", "topology"}


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = tyro.cli(
        TrainOptions,
        prog="vampnet train",
        args=argv,
        config=(FlagCreatePairsOff,),
    )
    names = {field.name for field in dataclasses.fields(options)}
    one_word = {name for name in names if "_" not in name}
    with named_as_options(names - one_word, subjects=one_word - PATHS):
        return _run(options)


def _run(options: TrainOptions) -> int:
    settings = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options)
        if field.name not in NOT_SETTINGS
    }
    settings["source_weights"] = _weights(options.source_weight)
    try:
        with loading():
            import jax
            from rich.console import Console

            from vampnet_jax import devices
            from vampnet_jax.training import begin, distributed, loop, pod_check
    except ImportError as error:
        raise InputError(
            f"Training needs the package {error.name}; install vampnet-jax[train]."
        ) from error

    request = begin.Request(
        **{name: getattr(options, name) for name in ASKED},
        lora={name.removeprefix("lora_"): getattr(options, name) for name in LORA},
        settings=settings,
    )
    if options.compile_only:
        devices.select("cpu")  # leaves this machine's own accelerators alone
        config, n_frames = begin.sizes(request)
        topology = options.topology or DEFAULT_TOPOLOGY
        fits = pod_check.check(config, n_frames, topology, options.mesh, Console())
        return OK if fits else FAILED_CHECK
    if options.topology is not None:
        raise InputError("--topology is for --compile-only; give that too, or leave it out.")
    distributed.connect()
    devices.keep_compiled_programs()  # a run that is continued starts sooner
    run = begin.begin(request)
    console = Console(quiet=jax.process_index() != 0)
    ending = loop.train(
        run.config,
        run.data,
        run.out,
        console,
        run.layout,
        initial=run.initial(),
        listening=run.listening,
    )
    statuses = {loop.Ending.INTERRUPTED: INTERRUPTED, loop.Ending.TERMINATED: TRY_AGAIN}
    return statuses.get(ending, OK)


def _weights(given: tuple[str, ...]) -> tuple[tuple[str, float], ...] | None:
    """`NAME=2.0`, … as pairs, in the order of the names; None if there are none."""
    weights = {}
    for text in given:
        name, _, number = text.rpartition("=")
        try:
            weights[name] = float(number)
        except ValueError:
            name = ""
        if not name:
            raise InputError(f"--source-weight is {text!r}; give a source and a number: NAME=2.0.")
    return tuple(sorted(weights.items())) or None
