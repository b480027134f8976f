"""Weights to begin a run from: those of another run, or of a model."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from codec_bridge.errors import InputError
from vampnet_jax import release
from vampnet_jax.config import ModelConfig
from vampnet_jax.model import Params
from vampnet_jax.training.checkpoints import read_run, read_weights
from vampnet_jax.training.tokens import CodecInfo


class Weights(NamedTuple):
    """A trained stage."""

    params: Params
    """As `vampnet_jax.apply` takes them, but NumPy arrays: what becomes of them decides where they
    go, and a device may hold only its part."""
    config: ModelConfig
    window: int
    """Frames that it reads at once."""


class Described(NamedTuple):
    """What is known of a stage without loading it."""

    config: ModelConfig
    window: int
    """Frames that it reads at once."""
    codec: CodecInfo


def describe_stage(source: str | Path, stage: str) -> Described:
    """The dimensions of one stage, and the codec whose tokens it speaks.

    Args:
      source, stage: as for `load_stage`.

    Raises:
      InputError: as `load_stage`; only configuration files are read.
    """
    if is_run(source):
        training, facts = read_run(Path(source))
        if facts.get("stage") != stage:
            raise InputError(
                f"{source} trains the {facts.get('stage')} stage; the {stage} stage is needed."
            )
        codec = CodecInfo(**facts["codec"])
        return Described(training.model, codec.frames(training.window_seconds), codec)
    description = release.read_description(release.resolve(source))
    try:
        names = [field.name for field in dataclasses.fields(CodecInfo)]
        codec = CodecInfo(**{name: description["codec"][name] for name in names})
    except KeyError as error:
        raise InputError(f"{source} does not say its codec's {error.args[0]}.") from None
    config = ModelConfig(**description[stage]["config"])
    return Described(config, description[stage]["window"], codec)


def load_stage(source: str | Path, stage: str) -> Weights:
    """The weights of one stage.

    Args:
      source: the folder of a training run (its checkpoint of lowest validation loss is taken), or
        a model: a directory or a name, as for `vampnet_jax.load`.
      stage: `coarse` or `fine`.

    Raises:
      InputError: neither, damaged, or a run of the other stage.
    """
    window = describe_stage(source, stage).window
    if is_run(source):
        return Weights(*read_weights(source), window)
    directory = release.resolve(source)
    loaded = release.read_stage(directory, stage, release.read_description(directory))
    return Weights(loaded.params, loaded.config, window)


def load_adapted(facts: Mapping[str, Any]) -> Params:
    """The model that a LoRA run adapts, from what its config.json says, in the host's memory.

    Raises:
      InputError: it is not where it was, or is another one now.
    """
    adapted = facts["adapted"]
    try:
        params = load_stage(adapted["source"], facts["stage"]).params
    except InputError as error:
        raise InputError(
            f"The model that this LoRA run adapts cannot be loaded: {error}"
        ) from error
    if release.params_fingerprint(params) != adapted["fingerprint"]:
        raise InputError(
            f"{adapted['source']} is no longer the model that this LoRA run adapts; put that one "
            "back."
        )
    return params


def is_run(source: str | Path) -> bool:
    """Whether this is the folder of a training run, not a model."""
    return (Path(source) / "checkpoints").is_dir()
