"""Which run a command begins, or continues: own run → given weights → from scratch."""

import dataclasses
import importlib.metadata
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from codec_bridge.errors import InputError
from vampnet_jax.config import ModelConfig
from vampnet_jax.model import Params
from vampnet_jax.training.checkpoints import CONFIG, read_run, write_run
from vampnet_jax.training.config import Preset, Stage, TrainConfig, preset_config
from vampnet_jax.training.initial import Weights, load_stage
from vampnet_jax.training.listening import ListeningOptions
from vampnet_jax.training.loop import TrainingData, open_data
from vampnet_jax.training.tokens import read_codebooks, read_manifest

MAY_CHANGE = {
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
    data: Path | None = None
    stage: Stage | None = None
    preset: Preset | None = None
    init_from: str | None = None
    """A run or a model whose weights to begin with."""
    codec: str | None = None
    """Turns tokens into sound, to listen to the run."""
    fine_model: str | None = None
    """Adds the other codebooks to what a coarse run makes."""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of `TrainConfig` and `ModelConfig`."""


class Run(NamedTuple):
    """A run that can be started or continued."""

    config: TrainConfig
    facts: dict[str, Any]
    """What its config.json says besides: stage, data, codec and so on."""
    data: TrainingData

    @property
    def listening(self) -> ListeningOptions:
        """What to listen with."""
        return ListeningOptions(**self.facts.get("listening") or {})

    def initial(self) -> Callable[[], Params] | None:
        """Loads the weights to begin with, if any were named."""
        source = self.facts.get("init_from")
        if source is None:
            return None

        def load() -> Params:
            return _weights(source, self.facts["stage"], self.data.codebooks).params

        return load


def holds_run(out: Path) -> bool:
    """Whether the folder holds a run, with or without checkpoints."""
    return (out / CONFIG).exists()


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
    manifest = read_manifest(request.data)
    codebooks = read_codebooks(request.data, manifest.codec)
    settings = dict(request.settings)
    if settings.get("seed") is None:
        settings["seed"] = secrets.randbelow(2**31)
    preset: Preset = request.preset or "tiny"
    stage: Stage = request.stage or ("fine" if preset == "fine" else "coarse")
    init_from = None
    if request.init_from is not None:
        path = Path(request.init_from)
        init_from = str(path.resolve()) if path.exists() else request.init_from
        source = _weights(init_from, stage, codebooks)
        settings = _with_dimensions(settings, source.config, init_from)
    config = preset_config(
        preset,
        stage,
        settings,
        codec_codebooks=manifest.codec.n_codebooks,
        codebook_size=manifest.codec.codebook_size,
        latent_dim=codebooks.shape[2],
    )
    data = open_data(config, request.data)
    facts = {
        "stage": stage,
        "preset": preset,
        "data": str(request.data.resolve()),
        "codec": dataclasses.asdict(manifest.codec),
        "init_from": init_from,
        "listening": {"codec": request.codec, "fine_model": request.fine_model},
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {out}: {error.strerror}") from error
    write_run(out, config, facts)
    return Run(config, facts, data)


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
    folder = request.data or Path(str(facts.get("data")))
    data = open_data(config, folder)
    if data.manifest.codec.fingerprint != facts.get("codec", {}).get("fingerprint"):
        raise InputError(
            f"{out} was trained with another codec than that of the tokens in {folder}."
        )
    listening = dict(facts.get("listening") or {})
    for name in ("codec", "fine_model"):
        if getattr(request, name) is not None:
            listening[name] = getattr(request, name)
    facts |= {"data": str(folder.resolve()), "listening": listening}
    write_run(out, config, facts)
    return Run(config, facts, data)


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
                f"{path} has {name} {size}, so --init-from cannot go with {settings[name]}."
            )
    return {**settings, **sizes}
