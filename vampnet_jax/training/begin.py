"""Which run a command begins, or continues: own run → given weights → from scratch.

A request is what a person asked for on the command line, so errors about it speak of options.
"""

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
from vampnet_jax.lora import LoraConfig
from vampnet_jax.model import Params
from vampnet_jax.release import params_fingerprint
from vampnet_jax.training import remote
from vampnet_jax.training.checkpoints import CONFIG, read_run, write_run
from vampnet_jax.training.config import Preset, Stage, TrainConfig, adapting, preset_config
from vampnet_jax.training.initial import (
    Described,
    Weights,
    describe_stage,
    load_adapted,
    load_stage,
)
from vampnet_jax.training.listening import Listening, ListeningOptions
from vampnet_jax.training.loop import TrainingData, open_data
from vampnet_jax.training.sharding import Layout, plan
from vampnet_jax.training.tokens import CodecInfo, read_codebooks, read_manifest

MAY_CHANGE = {
    "accumulate",
    "steps",
    "minutes",
    "log_every",
    "validate_every",
    "save_every",
    "save_minutes",
    "keep",
    "milestone_every",
    "listen_every",
}
"""Settings that a continued run takes; all others are those that it began with."""
DIMENSIONS = ("n_codebooks", "n_conditioning_codebooks", "n_layers", "n_heads", "embedding_dim")
"""Fields of `ModelConfig` that weights decide."""
PUBLISHED_CODEC = CodecInfo("", "lac", 44100, 768, n_codebooks=14, codebook_size=1024)
PUBLISHED_WIDTH = 8
"""The codec of the published weights, and the width of its codebooks."""
PACKAGES = ("vampnet-jax", "jax", "flax", "optax", "orbax-checkpoint", "grain")


@dataclasses.dataclass(frozen=True)
class Request:
    """What a person asks for; None where nothing is said."""

    out: Path | None = None
    """Folder of the run; needed to begin or continue one."""
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

    out: Path
    """Its folder."""
    config: TrainConfig
    facts: dict[str, Any]
    """What its config.json says besides: stage, data, codec and so on."""
    data: TrainingData
    listening: Listening | None
    """Makes sounds, where the settings ask for them."""
    layout: Layout
    """Which devices compute."""

    def initial(self) -> Callable[[], Params] | None:
        """Loads the weights to begin with, or to adapt, if any were named: NumPy arrays."""
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
    out = request.out
    if out is None and request.data is None:
        raise InputError("Give the folder of tokens and, with --out, that of the run.")
    if out is None:
        raise InputError("Give the folder of the run with --out.")
    if jax.process_count() == 1:
        return _begin(request, out)
    run, error = None, None
    if jax.process_index() == 0:
        try:
            run = _begin(request, out)
        except InputError as problem:
            error = problem
    first_failed = multihost_utils.broadcast_one_to_all(np.int32(error is not None))
    if run is None and not first_failed:
        try:
            run = continued(Request(data=request.data, mesh=request.mesh), out)
        except InputError as problem:
            error = problem
    # All leave together: one that goes alone would keep the others waiting.
    failed = np.flatnonzero(multihost_utils.process_allgather(np.int32(error is not None)))
    if error is not None:
        raise error
    if len(failed):
        raise InputError(f"Process {failed[0]} could not begin the run; its message says why.")
    assert run is not None
    return run


def _begin(request: Request, out: Path) -> Run:
    if request.resume and request.new:
        raise InputError("--resume and --new exclude each other.")
    if not request.resume and not (out / CONFIG).exists():
        return new(request, out)
    if request.new:
        raise InputError(
            f"{out} already holds a run; leave --new out to continue it, or choose another folder "
            "with --out."
        )
    return continued(request, out)


def new(request: Request, out: Path) -> Run:
    """Resolve the settings of a new run, check its data and make its folder.

    Raises:
      InputError: anything does not fit; nothing has been written then.
    """
    if request.settings.get("seed") is None:
        settings = {**request.settings, "seed": secrets.randbelow(2**31)}
        request = dataclasses.replace(request, settings=settings)
    if request.data is None:
        raise InputError("Give the folder of tokens to train from.")
    if out.exists() and (not out.is_dir() or any(not _is_hidden(path) for path in out.iterdir())):
        raise InputError(f"{out} is not empty; choose another folder with --out.")
    folder = remote.local(request.data)
    manifest = read_manifest(folder)
    codebooks = read_codebooks(folder, manifest.codec)
    if request.lora_from is None and _adapts(request):
        raise InputError("LoRA adapters are of a model: name it with --lora-from.")
    stage, source = _stage(request), _source(request)
    described, init_from, adapted = None, None, None
    if source is not None:
        described, weights = describe_stage(source, stage), _weights(source, stage, codebooks)
        if _adapts(request):
            adapted = {"source": source, "fingerprint": params_fingerprint(weights.params)}
        else:
            init_from = source
    config = _resolved(request, described, manifest.codec, codebooks.shape[2])
    layout = plan(config.model, config.batch_size, request.mesh, accumulate=config.accumulate)
    data = open_data(config, folder)
    options = ListeningOptions(_absolute(request.codec), _absolute(request.fine_model))
    listening = _listening(config, options, data)
    facts = {
        "stage": stage,
        "preset": _preset(request),
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
    return Run(out, config, facts, data, listening, layout)


def sizes(request: Request) -> tuple[TrainConfig, int]:
    """What a run would train, to be compiled and not trained: nothing large is read.

    Args:
      request: as for a run. What is missing is made up: the end of the run, tokens (those of the
        model that is begun with or adapted, else of the published codec), and the model that
        adapters are of (that of the preset, which is then by default the published one).

    Returns:
      The settings and T, the frames of an excerpt.

    Raises:
      InputError: impossible settings, no such model or run, or no token folder.
    """
    request = dataclasses.replace(request, settings={"steps": 1} | _given(request.settings))
    source = _source(request)
    described = None if source is None else describe_stage(source, _stage(request))
    codec, width = PUBLISHED_CODEC, PUBLISHED_WIDTH
    if request.data is not None:
        folder = remote.local(request.data)
        codec = read_manifest(folder).codec
        width = read_codebooks(folder, codec).shape[2]
    elif described is not None:
        codec, width = described.codec, described.config.latent_dim
    config = _resolved(request, described, codec, width)
    return config, codec.frames(config.window_seconds)


def continued(request: Request, out: Path) -> Run:
    """An existing run, with the few settings that may change.

    Raises:
      InputError: there is no run, or what is asked for is not what it began with.
    """
    config, facts = read_run(out)
    given = _given(request.settings)
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
    if request.init_from and facts.get("init_from") not in (
        request.init_from,
        str(Path(request.init_from).resolve()),  # which need not be there any more
    ):
        raise InputError(
            f"{out} was not begun with the weights of {request.init_from}; leave --init-from out, "
            "or train anew with another --out."
        )
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
    return Run(out, config, facts, data, listening, layout)


def _is_hidden(path: Path) -> bool:
    """Such as what a process that was killed leaves of a file it was writing."""
    return path.name.startswith(".")


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def _adapts(request: Request) -> bool:
    return request.lora_from is not None or bool(_given(request.lora))


def _stage(request: Request) -> Stage:
    return request.stage or ("fine" if request.preset == "fine" else "coarse")


def _preset(request: Request) -> Preset:
    """Adapters are trained as the published models were, unless another recipe is asked for."""
    return request.preset or (_stage(request) if _adapts(request) else "tiny")


def _source(request: Request) -> str | None:
    """The run or model to begin with or to adapt."""
    if request.init_from is not None and request.lora_from is not None:
        raise InputError("--init-from and --lora-from exclude each other.")
    if request.lora_from is not None and request.preset is not None:
        raise InputError("--lora-from has a recipe of its own; leave --preset out.")
    return _absolute(request.init_from or request.lora_from)


def _resolved(
    request: Request, source: Described | None, codec: CodecInfo, latent_dim: int
) -> TrainConfig:
    """All settings of a run that begins.

    Args:
      request: what is not given comes from the preset.
      source: what is begun with or adapted.
      codec, latent_dim: of the tokens.
    """
    settings = _given(request.settings)
    if source is not None:
        name = str(request.init_from or request.lora_from)
        settings = _with_dimensions(settings, source.config, name)
    if _adapts(request):
        window = None if source is None else source.window / codec.frame_rate
        settings = adapting(settings, window)
        settings["lora"] = LoraConfig(**_given(request.lora))
    return preset_config(
        _preset(request),
        _stage(request),
        settings,
        codec_codebooks=codec.n_codebooks,
        codebook_size=codec.codebook_size,
        latent_dim=latent_dim,
    )


def _absolute(source: str | None) -> str | None:
    """A path as it is from any folder; names stay as they are."""
    return str(Path(source).resolve()) if source and Path(source).exists() else source


def _listening(
    config: TrainConfig, options: ListeningOptions, data: TrainingData
) -> Listening | None:
    if not config.listen_every:
        for name, value in dataclasses.asdict(options).items():
            if value is not None:
                option = f"--{name.replace('_', '-')}"
                raise InputError(f"{option} is for listening to the run; give --listen-every too.")
    if not config.listen_every or data.validation is None or jax.process_index() != 0:
        return None
    return Listening(options, config, data.validation, data.window)


def _weights(source: str, stage: str, codebooks: np.ndarray) -> Weights:
    weights = load_stage(source, stage)
    spoken = weights.params["embedding"]["codebooks"]
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
