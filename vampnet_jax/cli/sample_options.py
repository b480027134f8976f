"""The options of `vampnet sample`, and what they mean to the library."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, UseAppendAction, arg

from codec_bridge.errors import InputError
from vampnet_jax import pipeline
from vampnet_jax.cli.naming import named_as_options
from vampnet_jax.pipeline import Edit
from vampnet_jax.prompts import BY_TIME, DEFAULT_PRESET, Prompt, preset
from vampnet_jax.release import presets as presets_of
from vampnet_jax.release import read_description, sampling_defaults
from vampnet_jax.sampling import SamplingOptions

Off = Literal["off", "None"]
OFF = get_args(Off)
Own = Literal["own"]
NOT_GIVEN = (None, "own")
"""What stands for the model's own way of sampling; `None` on the command line means off."""
KEEPING = {
    "periodic", "prefix", "suffix", "regions", "random", "onset", "beat", "beat_before",
    "keep_codebooks",
}  # fmt: skip
"""Prompt options that say what to keep; the others refine the default preset."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Make variations of music: what the prompt keeps stays, everything else is generated anew.

    Without a prompt option the preset medium-variation is used. What a preset keeps may differ from
    model to model; the record beside each result says it.
    """

    input: Annotated[Positional[tuple[Path, ...]], arg(metavar="INPUT...")] = ()
    """Audio files, or token files (.npz) that --tokens wrote."""
    output: Annotated[Path, arg(aliases=["-o"], metavar="FOLDER")] = Path("vamped")
    """Where to write; made if it is not there."""
    overwrite: bool = False
    """Replace files of earlier runs."""

    preset: Annotated[str | None, arg(metavar="NAME")] = None
    """timbre-transfer, small-variation, medium-variation, large-variation, the last three with
    beat- in front, or unconditional. Prompt options given beside it replace its own."""
    periodic: Annotated[int | None, arg(metavar="N")] = None
    """Keep every N-th frame; 0 keeps none, 1 all."""
    width: Annotated[int | None, arg(metavar="FRAMES")] = None
    """Frames kept around each periodic frame (1)."""
    offset: Annotated[int | None, arg(metavar="FRAMES")] = None
    """Move the periodic frames; drawn anew for each variation if left out."""
    prefix: Annotated[float | None, arg(metavar="SECONDS")] = None
    """Keep the beginning."""
    suffix: Annotated[float | None, arg(metavar="SECONDS")] = None
    """Keep the end."""
    region: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="START:STOP")] = ()
    """Generate only between these seconds, keep all else. Repeatable. Other prompts act inside."""
    random: Annotated[float | None, arg(metavar="SHARE")] = None
    """Generate this share of the tokens, chosen at random."""
    onset: Annotated[int | None, arg(metavar="FRAMES")] = None
    """Keep so many frames on each side of every onset."""
    beat: Annotated[float | None, arg(metavar="SECONDS")] = None
    """Keep so much after every beat."""
    beat_before: Annotated[float | None, arg(metavar="SECONDS")] = None
    """Keep so much before every beat."""
    beat_downbeats: bool = False
    """Follow only the first beat of each bar (taken to have four)."""
    beat_every: Annotated[int | None, arg(metavar="N")] = None
    """Follow only every N-th beat (1)."""
    beat_dropout: Annotated[float | None, arg(metavar="SHARE")] = None
    """Leave out this share of the beats at random (0)."""
    dropout: Annotated[float | None, arg(metavar="SHARE")] = None
    """Generate this share of the kept frames after all (0)."""
    keep_codebooks: Annotated[int | None, arg(metavar="N")] = None
    """Keep all of the first N codebooks (0)."""
    upper_codebooks: Annotated[int | None, arg(metavar="N")] = None
    """Generate all of the codebooks from the N-th on, counted from 0. If left out: 4 as in the
    original's presets with --periodic above 1, --random, --onset and --beat; else no codebook."""
    mask: Annotated[Path | None, arg(metavar="FILE.npy")] = None
    """Your own mask, (codebooks, frames) or (frames,), 1 = generate."""

    stretch: Annotated[int, arg(metavar="N")] = 1
    """Slow down N times: N-1 new frames after each frame."""
    pitch: Annotated[float, arg(metavar="SEMITONES")] = 0.0
    """Shift the pitch of the input first, -12 to 12."""
    extend: Annotated[float, arg(metavar="SECONDS")] = 0.0
    """Continue the clip."""
    feedback: Annotated[int, arg(metavar="N")] = 0
    """Vamp the result N times again, with the periodic frames moved each time."""
    stereo: bool = False
    """Keep two channels apart; of more, the even and the odd ones are mixed. Otherwise all are
    mixed to mono."""
    seconds: Annotated[float | None, arg(metavar="SECONDS")] = None
    """Make so much from nothing, without INPUT."""
    tokens: bool = False
    """Write token files (.npz) instead of audio."""

    num_samples: Annotated[int, arg(metavar="N")] = 1
    """Variations of each input."""
    seed: Annotated[int | None, arg(metavar="N")] = None
    """0 to 4294967295; drawn, shown and saved if left out."""
    model: Annotated[str, arg(metavar="NAME|FOLDER")] = "tiny"
    """A model in the box, or a model directory."""
    device: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    """Where the transformers compute; auto takes a GPU or TPU if JAX finds one."""
    dtype: Literal["float32", "bfloat16", "bfloat16-products"] | None = None
    """What the transformers compute in (as the model says). float32 is exact; bfloat16 is for GPUs
    and TPUs, bfloat16-products for CPUs with instructions for it."""
    mesh: Annotated[str | None, arg(metavar="AXIS=N,...")] = None
    """Divide the work over devices: sizes of data (the variations), tensor and fsdp (the model)."""
    from_params: Annotated[Path | None, arg(metavar="FILE.json")] = None
    """Repeat an earlier run from the .json beside its result, bit for bit on the same device and
    versions. Goes with INPUT (other audio), -o, --overwrite, --device, --mesh and --model only."""

    steps: Annotated[int | None, arg(metavar="N")] = None
    """Decoding steps of the coarse model, of all its codebooks together. This and what follows is
    the model's own if left out."""
    temperature: float | None = None
    """Below 1 safer, above 1 wilder."""
    mask_temperature: float | None = None
    """Randomness of the order in which tokens are settled; 0 settles the surest first."""
    sample_cutoff: Annotated[float | None, arg(metavar="SHARE")] = None
    """Share of the steps that draw at random; afterwards the likeliest token is taken."""
    top_k: int | Off | Own = "own"
    """Draw only from the K likeliest tokens."""
    top_p: float | Off | Own = "own"
    """Draw only from the likeliest tokens that hold this probability."""
    typical_mass: float | Off | Own = "own"
    """Draw only from tokens of typical surprisal that hold this probability."""
    typical_min_tokens: int | None = None
    """But from at least so many."""
    order: Literal["confidence", "spread"] | None = None
    """Which tokens a step settles: the surest, or some evenly spread over time, which is faster;
    --mask-temperature then does nothing."""
    codebook_steps: Annotated[str, arg(metavar="N,N,...|off")] = "own"
    """Settle one codebook after the other, each in so many steps, instead of --steps."""
    entropy_bound: Annotated[float | Off | Own, arg(metavar="NATS|off")] = "own"
    """Settle more tokens per step than scheduled, as many as have at most so much entropy; ends
    early. Goes with a low --mask-temperature."""
    guidance: Annotated[float | Off | Own, arg(metavar="X|off")] = "own"
    """Follow what is known of the predicted codebooks more closely; 0 changes nothing."""
    fine_steps: Annotated[int | None, arg(metavar="N")] = None
    """The same for the fine model."""
    fine_temperature: float | None = None
    fine_mask_temperature: float | None = None
    fine_sample_cutoff: Annotated[float | None, arg(metavar="SHARE")] = None
    fine_top_k: int | Off | Own = "own"
    fine_top_p: float | Off | Own = "own"
    fine_typical_mass: float | Off | Own = "own"
    fine_typical_min_tokens: int | None = None
    fine_order: Literal["confidence", "spread"] | None = None
    fine_codebook_steps: Annotated[str, arg(metavar="N,N,...|off")] = "own"
    fine_entropy_bound: Annotated[float | Off | Own, arg(metavar="NATS|off")] = "own"
    fine_guidance: Annotated[float | Off | Own, arg(metavar="X|off")] = "own"


NOT_RECORDED = ("input", "output", "overwrite", "device", "mesh", "from_params")
"""Options that do not change a result, or of which the record says more."""
RECORDED = [f.name for f in dataclasses.fields(Options) if f.name not in NOT_RECORDED]
FREE_WITHOUT_INPUT = [
    "seconds", "tokens", "num_samples", "seed", "model", "dtype",
    *(prefix + f.name for f in dataclasses.fields(SamplingOptions) for prefix in ("", "fine_")),
]  # fmt: skip
ARGUMENTS = {f.name for kind in (Prompt, Edit, SamplingOptions) for f in dataclasses.fields(kind)}
"""Of the library: what its errors speak of are options here."""
PRESET_OF_NOTHING = ("preset", "unconditional")


def parse(argv: list[str]) -> Options:
    """Options from a command line; exits with 2 if one is unknown or of the wrong type."""
    return tyro.cli(Options, args=argv, prog="vampnet sample", config=(FlagCreatePairsOff,))


def as_arguments(values: dict[str, Any]) -> list[str]:
    """A command line that gives options these values, as `Record.options` has them."""
    arguments: list[str] = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            arguments += [flag] * value
        elif isinstance(value, list):
            arguments += [f"{flag}={one}" for one in value]
        elif value is not None:
            arguments.append(f"{flag}={value}")
    return arguments


def with_defaults_of(model: Path, options: Options) -> Options:
    """The options with everything filled in that depends on the model.

    That is the prompt, if a preset says it, how the model is best sampled, and its dtype.
    """
    description = read_description(model)
    n_codebooks = description["fine"]["config"]["n_codebooks"]
    values = _of_preset(options, presets_of(description), n_codebooks)
    dtypes = {description[stage]["config"]["dtype"] for stage in ("coarse", "fine")}
    if options.dtype is None and len(dtypes) == 1:
        values["dtype"] = dtypes.pop()
    for stage, prefix in (("coarse", ""), ("fine", "fine_")):
        own = sampling_defaults(description, stage)
        for_all_codebooks = [getattr(options, prefix + name) for name in ("steps", "entropy_bound")]
        if any(value not in (*NOT_GIVEN, *OFF) for value in for_all_codebooks):
            own = own.changed(steps=own.steps)
        for name, value in dataclasses.asdict(own).items():
            if getattr(options, prefix + name) not in NOT_GIVEN:
                continue
            if isinstance(value, tuple):
                value = ",".join(map(str, value))
            values[prefix + name] = "off" if value is None else value
    return dataclasses.replace(options, **values)


def sampling_of(options: Options, prefix: str = "") -> SamplingOptions:
    """How to sample, of options with defaults filled in; prefix "fine_" for the fine model."""
    names = [field.name for field in dataclasses.fields(SamplingOptions)]
    values: dict[str, Any] = {name: getattr(options, prefix + name) for name in names}
    values = {name: None if value in OFF else value for name, value in values.items()}
    if values["codebook_steps"] is not None:
        values["codebook_steps"] = _numbers(values["codebook_steps"], f"{prefix}codebook_steps")
    with named_as_options(ARGUMENTS, prefix=prefix):
        return SamplingOptions(**values)


def _numbers(text: str, name: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        flag = name.replace("_", "-")
        raise InputError(f"--{flag} is {text!r}; write whole numbers as 12,4,2,2.") from None


def _of_preset(options: Options, presets: Mapping[str, Prompt], n_codebooks: int) -> dict[str, Any]:
    """The preset in options: that asked for, or what the prompt is if nothing is said of it.

    Options that only refine what has been switched off are left out, and codebooks that the model
    does not have.
    """
    given = _prompt_options(options)
    if options.seconds is not None:
        return {}
    if options.preset is not None:
        base = preset(options.preset, presets)
    elif options.mask is not None or given.keys() & KEEPING:
        return {}
    elif options.extend or options.stretch > 1:
        base = Prompt(periodic=1)  # what there is stays
    else:
        base = preset(DEFAULT_PRESET, presets)
    said = {k: v for k, v in dataclasses.asdict(base).items() if k not in given}
    if given.get("periodic") == 0:
        said = {k: v for k, v in said.items() if k not in ("width", "offset")}
    if not any(given.get(name, getattr(base, name)) for name in ("beat", "beat_before")):
        refining = ("beat_every", "beat_downbeats", "beat_dropout")
        said = {k: v for k, v in said.items() if k not in refining}
    both = said | given
    if not any(both[name] for name in BY_TIME) and both["random"] == 1:
        said.pop("dropout", None)
    if said.get("upper_codebooks") is not None:
        said["upper_codebooks"] = min(said["upper_codebooks"], n_codebooks)
    if said.pop("regions", ()):
        said["region"] = tuple(f"{start}:{stop}" for start, stop in base.regions)
    return said | {"preset": None}


def _prompt_options(options: Options) -> dict[str, Any]:
    """What of a `Prompt` is given."""
    given = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(Prompt)
        if field.name != "regions" and not _left_out(getattr(options, field.name))
    }
    if options.region:
        given["regions"] = tuple(_span(text) for text in options.region)
    return given


def prompt_of(options: Options) -> Prompt:
    """The prompt that the options ask for, of options with defaults filled in."""
    with named_as_options(ARGUMENTS):
        prompt = Prompt(**_prompt_options(options))
    if prompt.dropout and not prompt.keeps_frames:
        raise InputError(
            "--dropout generates some of the frames that are kept, and this prompt keeps none; "
            "say which it keeps, for example with --periodic."
        )
    return prompt


def _left_out(value: object) -> bool:
    return value is None or value is False  # 0 is not: it replaces what a preset says


def edit_of(options: Options) -> Edit:
    """What else the options ask to be done to a clip; its own mask comes later."""
    if options.seconds is not None:
        return Edit(extend=options.seconds)
    with named_as_options(ARGUMENTS):
        return Edit(stretch=options.stretch, extend=options.extend, feedback=options.feedback)


def _span(text: str) -> tuple[float, float]:
    start, colon, stop = text.partition(":")
    try:
        if not colon:
            raise ValueError
        return float(start), float(stop)
    except ValueError:
        raise InputError(f"--region is {text!r}; write it in seconds as START:STOP.") from None


def check_from_nothing(options: Options) -> None:
    """Raise InputError for options that need an input."""
    seconds = options.seconds
    assert seconds is not None
    if not pipeline.MIN_SECONDS <= seconds <= pipeline.MAX_SECONDS:
        raise InputError(
            f"--seconds is {seconds:g}; it must be from {pipeline.MIN_SECONDS:g} to "
            f"{pipeline.MAX_SECONDS}."
        )
    if options.input:
        raise InputError(f"--seconds makes music from nothing; leave out {options.input[0]}.")
    allowed = Options(
        **{name: getattr(options, name) for name in (*NOT_RECORDED, *FREE_WITHOUT_INPUT)}
    )
    for field in dataclasses.fields(Options):
        value = getattr(options, field.name)
        if value != getattr(allowed, field.name) and (field.name, value) != PRESET_OF_NOTHING:
            raise InputError(
                f"--{field.name.replace('_', '-')} needs an input; with --seconds there is "
                "nothing to keep or to change."
            )
