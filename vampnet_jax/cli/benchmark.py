"""`vampnet benchmark`: how fast a model samples here, stage by stage."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, arg

from codec_bridge.errors import InputError
from vampnet_jax.cli.naming import named_as_options
from vampnet_jax.cli.status import FAILED_CHECK, OK

if TYPE_CHECKING:
    from vampnet_jax.benchmarking.measuring import Measurement
    from vampnet_jax.benchmarking.settings import Setting

FORMAT_VERSION = 1
TABLE, PLOT = "benchmark.json", "benchmark.png"
Off = Literal["off"]


@dataclasses.dataclass(frozen=True)
class Options:
    """Measure how fast a model samples: seconds of every stage, medians over repeated runs.

    Of --batch, --seconds, --steps and --fine-steps several values can be given; each further value
    is measured with the first of the others. Rates are compared with what matrix products of the
    same shapes and dtype reach in the same run.
    """

    model: Annotated[str | None, arg(metavar="NAME|FOLDER")] = None
    """A model in the box (tiny if left out), or a model directory."""
    config: Literal["coarse", "fine"] | None = None
    """Instead of a model: one transformer of the published size, random weights, no codec."""
    device: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    """Where the transformers compute; auto takes a GPU or TPU if JAX finds one."""
    mesh: Annotated[str | None, arg(metavar="AXIS=N,...")] = None
    """Divide the work over devices: sizes of data (the batch), tensor and fsdp (the model)."""
    batch: Annotated[tuple[int, ...], arg(metavar="N...")] = (1,)
    """Clips made at once."""
    seconds: Annotated[tuple[float, ...], arg(metavar="SECONDS...")] = (10.0,)
    """Length of a clip."""
    steps: Annotated[tuple[int, ...], arg(metavar="N...")] = ()
    """Decoding steps of the coarse model (as the model is best sampled)."""
    fine_steps: Annotated[tuple[int, ...], arg(metavar="N...")] = ()
    """Decoding steps of the fine model (as the model is best sampled)."""
    dtype: Literal["float32", "bfloat16", "bfloat16-products"] | None = None
    """What matrix products compute in (as the model says)."""
    attention: Literal["xla", "cudnn"] | None = None
    """Attention kernel (as the model says); cudnn needs an NVIDIA GPU and bfloat16."""
    typical_mass: float | Off | None = None
    """Filters of both stages, as in vampnet sample (as the model is best sampled)."""
    top_k: int | Off | None = None
    top_p: float | Off | None = None
    order: Literal["confidence", "spread"] | None = None
    """Which tokens a step of either stage settles, as in vampnet sample."""
    guidance: float | Off | None = None
    """Of both stages, as in vampnet sample."""
    compare: Annotated[tuple[str, ...], arg(metavar="OPTION=VALUE...")] = ()
    """Measure a second setting that differs in these options alternately with the first, and
    print how much faster it is; such as dtype=bfloat16."""
    repeats: Annotated[int | None, arg(metavar="N")] = None
    """Timed runs (5), after one that compiles and one to warm up."""
    topology: Annotated[str | None, arg(metavar="NAME")] = None
    """Measure nothing, but compile for TPU chips that need not be here, such as v5e:2x2, and
    print memory and the least time by the chip's data sheet; exit status 1 if it does not fit."""
    output: Annotated[Path | None, arg(aliases=["-o"], metavar="FOLDER")] = None
    """Write benchmark.json and a plot, benchmark.png, into this folder."""
    overwrite: bool = False
    """Replace files of earlier runs."""


ALTERNATIVES = ("batch", "seconds", "steps", "fine_steps")
"""Options of which several values can be given."""
UNUSED = {"coarse": "fine_steps", "fine": "steps"}
"""What a transformer alone has no use for."""


def main(argv: list[str]) -> int:
    """Run the command; InputError for what a person got wrong."""
    options = _parse(argv)
    from vampnet_jax import devices

    settings = _points(options)
    repeats = 5 if options.repeats is None else options.repeats
    if repeats < 1:
        raise InputError(f"--repeats is {repeats}; it must be at least 1.")
    changed = _changed(options, settings)
    if options.overwrite and options.output is None:
        raise InputError("--overwrite replaces files in --output, which is not given.")
    for setting in (*settings, *changed):
        _check_model(setting)
    if options.topology is not None:
        return _compile_ahead(options, settings)
    every = {setting.device for setting in (*settings, *changed)}
    if len(every) == 1:
        with named_as_options(subjects=("device",)):
            devices.select(options.device)
    for setting in (*settings, *changed):
        _ = setting.found_device
    _measure(options, settings, changed, repeats)
    return OK


def _parse(argv: list[str]) -> Options:
    return tyro.cli(Options, args=argv, prog="vampnet benchmark", config=(FlagCreatePairsOff,))


def _points(options: Options) -> "list[Setting]":
    """The settings to measure: the first values, then each further value of each option."""
    if options.config is not None:
        if options.model is not None:
            raise InputError("--config has random weights; leave out --model, or --config.")
        unused = UNUSED[options.config]
        if getattr(options, unused):
            raise InputError(
                f"--{unused.replace('_', '-')} has no effect on --config {options.config}; "
                "leave it out."
            )
    values = {name: getattr(options, name) or _default(name) for name in ALTERNATIVES}
    first = {name: given[0] for name, given in values.items()}
    further = [first | {name: value} for name, given in values.items() for value in given[1:]]
    return [_setting(options, **chosen) for chosen in (first, *further)]


def _default(name: str) -> tuple:
    """Of an option of which several values can be given."""
    from vampnet_jax.benchmarking.settings import Setting

    return (getattr(Setting, name),)


def _setting(options: Options, **chosen: Any) -> "Setting":
    from vampnet_jax.benchmarking.settings import Setting

    values = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(Setting)
        if field.name not in ALTERNATIVES
    }
    values["model"] = options.model or Setting.model
    return Setting(**values, **chosen)


def _changed(options: Options, settings: "list[Setting]") -> "list[Setting]":
    """The setting that --compare asks for, if it does."""
    if not options.compare:
        return []
    if len(settings) > 1:
        raise InputError("--compare compares two settings; give one value of every option.")
    if options.topology is not None:
        raise InputError("--compare measures, and --topology only compiles; leave one out.")
    changes: dict[str, Any] = {}
    names = [field.name for field in dataclasses.fields(settings[0])]
    for pair in options.compare:
        key, equals, value = pair.partition("=")
        name = key.removeprefix("--").replace("-", "_")
        if not equals or name not in names:
            raise InputError(
                f"--compare has {pair!r}; write OPTION=VALUE with one of "
                f"{', '.join(n.replace('_', '-') for n in names)}."
            )
        parsed = getattr(_parse([f"--{name.replace('_', '-')}", value]), name)
        changes[name] = parsed[0] if name in ALTERNATIVES else parsed
    changed = dataclasses.replace(settings[0], **changes)
    if changed == settings[0]:
        raise InputError(f"--compare {' '.join(options.compare)} changes nothing.")
    for setting in (settings[0], changed):
        if setting.config is not None and UNUSED[setting.config] in changes:
            unused = UNUSED[setting.config].replace("_", "-")
            raise InputError(f"--{unused} has no effect on --config {setting.config}.")
    return [changed]


def _check_model(setting: "Setting") -> None:
    """Raise InputError for a model that is not there, before anything is computed."""
    if setting.config is None:
        from vampnet_jax.release import read_description, resolve

        read_description(resolve(setting.model))


def _measure(
    options: Options, settings: "list[Setting]", changed: "list[Setting]", repeats: int
) -> None:
    import contextlib

    import jax
    from rich.console import Console

    from vampnet_jax.benchmarking import measuring, report
    from vampnet_jax.cli.progress import StageBars
    from vampnet_jax.cli.results import Results, environment, run_interruptibly

    # What is compiled is timed; a program from the cache would not be.
    jax.config.update("jax_enable_compilation_cache", False)
    console = Console(soft_wrap=True)
    names = [TABLE, PLOT]

    def work(results: Results | None) -> None:
        groups = [[*settings, *changed]] if changed else [[setting] for setting in settings]
        measured: list[Measurement] = []
        with StageBars() as bars:
            for group in groups:
                measured += measuring.measure(group, repeats, bars)
                for one in measured[-len(group) :]:
                    report.show(one, console)
        content: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "environment": environment(),
            "repeats": repeats,
            "measurements": [one.as_json() for one in measured],
        }
        if changed:
            change = " ".join(options.compare)
            base, other = measured
            report.show_comparison(base, other, change, console)
            faster = report.ratios(base, other)
            content["times_as_fast"] = {
                "with": change,
                "stages": {name: measuring.spread(values) for name, values in faster.items()},
            }
        if results is not None:
            (results.staging / TABLE).write_text(json.dumps(content, indent=2) + "\n")
            report.draw(results.staging / PLOT, measured)
            results.commit(names)
            paths = (results.folder / TABLE, results.folder / PLOT)
            console.print(*paths, highlight=False, soft_wrap=True)

    with contextlib.ExitStack() as stack:
        results = None
        if options.output is not None:
            results = Results(options.output, names, overwrite=options.overwrite)
            stack.enter_context(results)
        run_interruptibly(
            lambda: work(results), results.discard if results is not None else lambda: None
        )


def _compile_ahead(options: Options, settings: "list[Setting]") -> int:
    """Compile for a TPU topology and print what it takes."""
    from rich.console import Console

    try:
        from vampnet_jax.benchmarking import ahead
    except ImportError as error:
        raise InputError(
            f"--topology needs the package {error.name}; install vampnet-jax[train,tpu]."
        ) from error

    assert options.topology is not None
    for name in ("repeats", "output"):
        if getattr(options, name) is not None:
            raise InputError(f"--{name} has no effect on --topology, which measures nothing.")
    if options.device != "auto":
        raise InputError("--device has no effect on --topology; leave it out.")
    console = Console(soft_wrap=True)
    fits = [ahead.check(setting, options.topology, console) for setting in settings]
    return OK if all(fits) else FAILED_CHECK
