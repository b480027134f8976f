"""What is compared: the paper's experiments, the baselines, and experiments from a YAML file.

    experiments:
      sparse:                     # a name
        - {name: p=5, periodic: 5}
        - {name: p=5 cooler, periodic: 5, temperature: 0.8, steps: 12}
        - {name: 500 bit/s or so, kind: compress, codebooks: 2, period: 2}

A condition of kind `vamp` (the default) takes the options of a prompt and of coarse sampling;
`compress` takes `codebooks`, `period` and the options of sampling, `codec` takes `codebooks`, and
`opus` takes `kbps`.
"""

import dataclasses
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

from codec_bridge.errors import InputError
from vampnet_jax.compression.container import MAX_PERIOD
from vampnet_jax.prompts import Prompt
from vampnet_jax.release import Model
from vampnet_jax.sampling import SamplingOptions

KINDS = ("vamp", "compress", "codec", "fine", "random", "opus")
BITRATE_PLOT = "bitrate.png"
"""Of all conditions that have a bitrate."""
_SAMPLING = {field.name for field in dataclasses.fields(SamplingOptions)}
_PROMPT = {field.name for field in dataclasses.fields(Prompt)}
_OWN = {"compress": {"codebooks", "period"}, "codec": {"codebooks"}, "opus": {"kbps"}}


@dataclasses.dataclass(frozen=True)
class Condition:
    """One way to make a recording from an excerpt."""

    experiment: str
    name: str
    kind: str = "vamp"
    """vamp: generate what the prompt does not keep. compress: what a `.vnt` file sounds like.
    codec: encode and decode. fine: keep all coarse tokens. random: random tokens. opus: Opus."""
    prompt: Prompt = dataclasses.field(default_factory=Prompt)
    sampling: tuple[tuple[str, Any], ...] = ()
    """Options of coarse sampling that differ from the model's own."""
    codebooks: int | None = None
    """compress, codec: the first so many codebooks are kept; None: all."""
    period: int = 1
    """compress: every so many frames are kept."""
    kbps: float = 6.0
    """opus: about so many kbit/s."""

    @property
    def slug(self) -> str:
        """A file name that differs wherever the condition does."""
        content = json.dumps(dataclasses.asdict(self), sort_keys=True, default=str)
        words = re.sub(r"[^a-z0-9]+", "-", f"{self.experiment} {self.name}".lower()).strip("-")
        return f"{words[:60]}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"

    def check(self, model: Model, seconds: float) -> None:
        """Raise InputError if it cannot be tried with a model and excerpts of some length."""
        try:
            model.coarse_sampling.changed(**dict(self.sampling)).check(model.coarse.config)
            self.prompt.check_duration(seconds)
            kept = self.prompt.prefix + self.prompt.suffix
            if kept >= seconds and self.kind == "vamp":
                raise InputError(
                    f"prefix and suffix keep all of the excerpts, which last {seconds:g} s."
                )
            n = model.fine.config.n_codebooks
            if self.codebooks is not None and self.codebooks > n:
                raise InputError(f"codebooks is {self.codebooks}; the model has {n}.")
            if self.period > MAX_PERIOD:
                raise InputError(f"period is {self.period}; it must be at most {MAX_PERIOD}.")
        except InputError as error:
            raise InputError(f"{self.experiment}, {self.name}: {error}") from None


def baselines() -> list[Condition]:
    """What every experiment is compared with: the codec, the fine model on true coarse tokens,
    and random tokens."""
    return [
        Condition("baselines", "codec", "codec"),
        Condition("baselines", "fine model only", "fine"),
        Condition("baselines", "random tokens", "random"),
    ]


def paper_experiments(n_coarse: int, n_codebooks: int) -> dict[str, list[Condition]]:
    """The experiments of VampNet, section 5, for a model of so many codebooks.

    prompts: periodic, nothing kept, inpainting with 1 or 2 s on both sides, and 75 ms after every
    beat. steps: decoding steps at p=16. compression: codebooks kept × period, beside the codec
    with fewer codebooks, whose bits per second rise with them, and Opus at three rates.
    """
    prompts = [
        *(
            Condition("prompts", f"p={p}", prompt=Prompt(periodic=p, upper_codebooks=n_coarse))
            for p in (2, 7, 8, 16, 32)
        ),
        Condition("prompts", "nothing kept"),
        *(
            Condition("prompts", f"inpaint {s} s", prompt=Prompt(prefix=s, suffix=s))
            for s in (1.0, 2.0)
        ),
        Condition("prompts", "beat 75 ms", prompt=Prompt(beat=0.075, upper_codebooks=n_coarse)),
    ]
    steps = [
        Condition(
            "steps", f"{n} steps", prompt=Prompt(periodic=16, upper_codebooks=n_coarse),
            sampling=(("steps", n),),
        )
        for n in (1, 4, 8, 12, 24, 36, 64, 72)
    ]  # fmt: skip
    fewer = sorted({1, 2, n_codebooks // 4, n_codebooks // 2} - {0, n_codebooks})
    compression = [
        *(
            Condition("compression", f"{k} codebooks, p={p}", "compress", codebooks=k, period=p)
            for k in sorted({1, max(1, n_coarse // 2), n_coarse})
            for p in (1, 2, 4, 8, 16)
        ),
        *(Condition("compression", f"codec, {n} codebooks", "codec", codebooks=n) for n in fewer),
        *(Condition("compression", f"Opus {k} kbit/s", "opus", kbps=k) for k in (6, 12, 24)),
    ]
    return {"prompts": prompts, "steps": steps, "compression": compression}


def read_experiments(path: Path) -> dict[str, list[Condition]]:
    """Experiments of a person's own; the form is shown at the top of this module.

    Raises:
      InputError: no such file, no YAML, or a condition with options that do not exist or do not
        work.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {str(error).splitlines()[0]}.") from None
    experiments = content.get("experiments") if isinstance(content, dict) else None
    if not isinstance(experiments, dict) or not all(
        isinstance(rows, list) and rows for rows in experiments.values()
    ):
        raise InputError(f"{path} has no `experiments:` with a list of conditions by name.")
    read = {
        str(name): [_condition(path, str(name), row) for row in rows]
        for name, rows in experiments.items()
    }
    plots = [plot_name(name) for name in read]
    for name, plot in zip(read, plots, strict=True):
        if plot == BITRATE_PLOT or plots.count(plot) > 1:
            raise InputError(
                f"{path}: the plot of experiment {name!r}, {plot}, would replace another; choose "
                "another name."
            )
    for name, conditions in read.items():
        names = [condition.name for condition in conditions]
        twice = next((x for x in names if names.count(x) > 1), None)
        if twice is not None:
            raise InputError(f"{path}: experiment {name!r} has two conditions named {twice!r}.")
    return read


def plot_name(experiment: str) -> str:
    """The file of its plot."""
    return "".join(c if c.isalnum() or c in ".-_" else "-" for c in experiment) + ".png"


def _condition(path: Path, experiment: str, row: Any) -> Condition:
    where = f"{path}: in experiment {experiment!r}"
    if not isinstance(row, dict) or not isinstance(row.get("name"), str):
        raise InputError(f"{where} a condition has no `name:`.")
    options = dict(row)
    name, kind = options.pop("name"), options.pop("kind", "vamp")
    where += f", condition {name!r}:"
    if kind not in KINDS:
        raise InputError(f"{where} there is no kind {kind!r}; choose one of {', '.join(KINDS)}.")
    known = set(_OWN.get(kind, set()))
    if kind in ("vamp", "compress"):
        known |= _SAMPLING
    if kind == "vamp":
        known |= _PROMPT
    unknown = sorted(set(options) - known)
    if unknown:
        raise InputError(
            f"{where} a condition of kind {kind} has no option {unknown[0]!r}; it has "
            f"{', '.join(sorted(known)) or 'none'}."
        )
    if isinstance(options.get("codebook_steps"), list):
        options["codebook_steps"] = tuple(options["codebook_steps"])
    checked = _PROMPT | {"order", "codebook_steps"}  # by Prompt and SamplingOptions
    for option, value in ((k, v) for k, v in options.items() if k not in checked):
        whole = option in ("codebooks", "period")
        sort, types = ("whole number", int) if whole else ("number", int | float)
        if value is not None and not isinstance(value, types):
            raise InputError(f"{where} {option} is {value!r}; it must be a {sort}.")
    try:
        sampling = {k: v for k, v in options.items() if k in _SAMPLING}
        SamplingOptions(**sampling)
        prompt = {k: v for k, v in options.items() if k in _PROMPT and v is not None}
        if "regions" in prompt:
            prompt["regions"] = tuple((float(a), float(b)) for a, b in prompt["regions"])
        own = {k: v for k, v in options.items() if k in _OWN.get(kind, set())}
        for option, value in own.items():
            if value is None or not 1 <= value < math.inf:
                raise InputError(f"{option} is {value}; it must be at least 1.")
        return Condition(
            experiment, name, kind, Prompt(**prompt), tuple(sorted(sampling.items())), **own
        )
    except (InputError, TypeError, ValueError) as error:
        raise InputError(f"{where} {error}") from None
