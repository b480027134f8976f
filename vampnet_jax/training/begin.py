"""Which run a command begins, or continues: own run → given weights → from scratch."""

import dataclasses
import functools
import importlib.metadata
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from codec_bridge.errors import InputError
from vampnet_jax.config import ModelConfig
from vampnet_jax.lora import LoraConfig, fingerprint
from vampnet_jax.model import Params
from vampnet_jax.training import remote
from vampnet_jax.training.checkpoints import CONFIG, read_run, write_run
from vampnet_jax.training.config import Preset, Stage, TrainConfig, adapting, preset_config
from vampnet_jax.training.initial import Weights, load_adapted, load_stage
from vampnet_jax.training.listening import Listening, ListeningOptions
from vampnet_jax.training.loop import TrainingData, open_data
from vampnet_jax.training.sharding import Layout, plan
from vampnet_jax.training.tokens import read_codebooks, read_manifest

MAY_CHANGE = {
    "accumulate",
    "steps",
    "minutes",
    "log_every",
    "validate_every",
    "validation_excerpts",
    "save_every",
    "save_minutes",
    "keep",
    "milestone_every",
    "listen_every",
}
"""Settings that a continued run takes; all others are those that it began with."""
DIMENSIONS = ("n_codebooks", "n_conditioning_codebooks", "n_layers", "n_heads", "embedding_dim")
"""Fields of `ModelConfig` that weights decide."""
PACKAGES = ("vampnet-jax", "jax", "flax", "optax", "orbax-checkpoint", "grain")


@dataclasses.dataclass(frozen=True)
class Request:
    """What a person asks for; None where nothing is said."""

    out: Path
    data: str | Path | None = None
    """Folder of tokens: a path, or an address such as `gs://bucket/tokens`."""
    stage: Stage | None = None
    preset: Preset | None = None
    resume: bool = False
    """Refuse to begin a run."""
    new: bool = False
    """Refuse to continue one."""
    init_from: str | None = None
    """A run or a model whose weights to begin with."""
    lora_from: str | None = None
    """A run or a model to train LoRA adapters of."""
    lora: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of `LoraConfig`; None means not given."""
    codec: str | None = None
    """Turns tokens into sound, to listen to the run."""
    fine_model: str | None = None
    """Adds the other codebooks to what a coarse run makes."""
    mesh: str | None = None
    """How many devices divide what; not kept with the run."""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of `TrainConfig` and `ModelConfig`."""


class Run(NamedTuple):
    """A run that can be started or continued."""

    config: TrainConfig
    facts: dict[str, Any]
    """What its config.json says besides: stage, data, codec and so on."""
    data: TrainingData
    listening: Listening | None
    """Makes sounds, where the settings ask for them."""
    layout: Layout
    """Which devices compute."""

    def initial(self) -> Callable[[], Params] | None:
        """Loads the weights to begin with, or to adapt, if any were named."""
        if self.facts.get("adapted"):
            return functools.partial(load_adapted, self.facts)
        source = self.facts.get("init_from")
        if source is None:
            return None

        def load() -> Params:
            return _weights(source, self.facts["stage"], self.data.codebooks).params

        return load


def begin(request: Request) -> Run:
    """Continue the run in the folder if there is one, else begin it.

    With several processes all must call this; process 0 decides and writes, the others follow.

    Raises:
      InputError: anything does not fit, or the request forbids it.
    """
    if jax.process_count() == 1:
        return _begin(request)
    run, error = None, None
    if jax.process_index() == 0:
        try:
            run = _begin(request)
        except InputError as problem:
            error = problem
    failed = multihost_utils.broadcast_one_to_all(np.int32(error is not None))
    if error is not None:
        raise error
    if failed:
        raise InputError("Process 0 could not begin the run; its message says why.")
    return run or continued(Request(out=request.out, data=request.data, mesh=request.mesh))


def _begin(request: Request) -> Run:
    out = request.out
    if request.resume and request.new:
        raise InputError("--resume and --new exclude each other.")
    if not request.resume and not (out / CONFIG).exists():
        return new(request)
    if request.new:
        raise InputError(
            f"{out} already holds a run; leave --new out to continue it, or choose another folder "
            "with --out."
        )
    return continued(request)


def new(request: Request) -> Run:
    """Resolve the settings of a new run, check its data and make its folder.

    Raises:
      InputError: anything does not fit; nothing has been written then.
    """
    out = request.out
    if request.data is None:
        raise InputError("Give the folder of tokens to train from.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not empty; choose another folder with --out.")
    folder = remote.local(request.data)
    manifest = read_manifest(folder)
    codebooks = read_codebooks(folder, manifest.codec)
    settings = dict(request.settings)
    if settings.get("seed") is None:
        settings["seed"] = secrets.randbelow(2**31)
    preset: Preset = request.preset or "tiny"
    stage: Stage = request.stage or ("fine" if preset == "fine" else "coarse")
    init_from, lora_from = _absolute(request.init_from), _absolute(request.lora_from)
    if init_from is not None and lora_from is not None:
        raise InputError("--init-from and --lora-from exclude each other.")
    adapters = {name: value for name, value in request.lora.items() if value is not None}
    if adapters and lora_from is None:
        raise InputError("LoRA adapters are of a model: name it with --lora-from.")
    adapted = None
    if init_from is not None:
        source = _weights(init_from, stage, codebooks)
        settings = _with_dimensions(settings, source.config, init_from)
    if lora_from is not None:
        if request.preset is not None:
            raise InputError("--lora-from has a recipe of its own; leave --preset out.")
        source = _weights(lora_from, stage, codebooks)
        settings = _with_dimensions(settings, source.config, lora_from)
        preset = stage
        settings = adapting(settings, source.window / manifest.codec.frame_rate)
        settings["lora"] = LoraConfig(**adapters)
        adapted = {"source": lora_from, "fingerprint": fingerprint(source.params)}
    config = preset_config(
        preset,
        stage,
        settings,
        codec_codebooks=manifest.codec.n_codebooks,
        codebook_size=manifest.codec.codebook_size,
        latent_dim=codebooks.shape[2],
    )
    layout = plan(config.model, config.batch_size, request.mesh, accumulate=config.accumulate)
    data = open_data(config, folder)
    options = ListeningOptions(_absolute(request.codec), _absolute(request.fine_model))
    listening = _listening(config, options, data)
    facts = {
        "stage": stage,
        "preset": preset,
        "data": remote.absolute(request.data),
        "codec": dataclasses.asdict(manifest.codec),
        "init_from": init_from,
        "adapted": adapted,
        "listening": dataclasses.asdict(options),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {out}: {error.strerror}") from error
    write_run(out, config, facts)
    return Run(config, facts, data, listening, layout)


def continued(request: Request) -> Run:
    """An existing run, with the few settings that may change.

    Raises:
      InputError: there is no run, or what is asked for is not what it began with.
    """
    out = request.out
    config, facts = read_run(out)
    given = {name: value for name, value in request.settings.items() if value is not None}
    known = config.to_dict()
    known |= known.pop("model")
    for name, value in given.items():
        if name not in MAY_CHANGE and known[name] != value:
            raise InputError(
                f"{out} was begun with {name} {known[name]} and cannot be continued with {value}; "
                "leave the option out, or train anew with another --out."
            )
    for name in ("stage", "preset"):
        if getattr(request, name) not in (None, facts.get(name)):
            raise InputError(
                f"{out} was begun with --{name} {facts.get(name)} and cannot be continued with "
                f"{getattr(request, name)}; train anew with another --out."
            )
    config = dataclasses.replace(
        config, **{name: value for name, value in given.items() if name in MAY_CHANGE}
    )
    adapted = facts.get("adapted") or {}
    if request.lora_from and _absolute(request.lora_from) != adapted.get("source"):
        raise InputError(
            f"{out} was begun with --lora-from {adapted.get('source')} and cannot be continued "
            f"with {request.lora_from}; train anew with another --out."
        )
    for name, value in request.lora.items():
        if value is not None and getattr(config.lora, name, None) != value:
            raise InputError(
                f"{out} was begun with another --lora-{name} than {value}; leave the option out, "
                "or train anew with another --out."
            )
    layout = plan(config.model, config.batch_size, request.mesh, accumulate=config.accumulate)
    place = request.data or str(facts.get("data"))
    data = open_data(config, remote.local(place))
    if data.manifest.codec.fingerprint != facts.get("codec", {}).get("fingerprint"):
        raise InputError(
            f"{out} was trained with another codec than that of the tokens in {place}."
        )
    known_options = facts.get("listening") or {}
    options = ListeningOptions(
        _absolute(request.codec) or known_options.get("codec"),
        _absolute(request.fine_model) or known_options.get("fine_model"),
    )
    listening = _listening(config, options, data)
    facts |= {"data": remote.absolute(place), "listening": dataclasses.asdict(options)}
    if jax.process_index() == 0:
        write_run(out, config, facts)
    return Run(config, facts, data, listening, layout)


def _absolute(source: str | None) -> str | None:
    """A path as it is from any folder; names stay as they are."""
    return str(Path(source).resolve()) if source and Path(source).exists() else source


def _listening(
    config: TrainConfig, options: ListeningOptions, data: TrainingData
) -> Listening | None:
    if not config.listen_every or data.validation is None or jax.process_index() != 0:
        return None
    return Listening(options, config, data.validation, data.window)


def _weights(source: str, stage: str, codebooks: np.ndarray) -> Weights:
    weights = load_stage(source, stage)
    spoken = np.asarray(weights.params["embedding"]["codebooks"])
    if not np.array_equal(spoken, codebooks[: len(spoken)]):
        raise InputError(f"{source} speaks the tokens of another codec than those given.")
    return weights


def _with_dimensions(settings: Mapping[str, Any], source: ModelConfig, path: str) -> dict[str, Any]:
    """Settings with the dimensions that the weights have."""
    sizes = {name: getattr(source, name) for name in DIMENSIONS}
    for name, size in sizes.items():
        if settings.get(name) not in (None, size):
            raise InputError(
                f"{path} has {name} {size}, which cannot become {settings[name]}; leave it out."
            )
    return {**settings, **sizes}
