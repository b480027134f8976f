"""Weights to begin a run from: those of another run, or of a model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from codec_bridge.errors import InputError
from vampnet_jax import lora, release
from vampnet_jax.config import ModelConfig
from vampnet_jax.model import Params
from vampnet_jax.training.checkpoints import load_run, read_run
from vampnet_jax.training.tokens import CodecInfo


class Weights(NamedTuple):
    """A trained stage."""

    params: Params
    """As `vampnet_jax.apply` takes them."""
    config: ModelConfig
    window: int
    """Frames that it reads at once."""


def load_stage(source: str | Path, stage: str) -> Weights:
    """The weights of one stage.

    Args:
      source: the folder of a training run (its checkpoint of lowest validation loss is taken), or
        a model: a directory or a name, as for `vampnet_jax.load`.
      stage: `coarse` or `fine`.

    Raises:
      InputError: neither, damaged, or a run of the other stage.
    """
    if is_run(source):
        training, facts = read_run(Path(source))
        if facts.get("stage") != stage:
            raise InputError(
                f"{source} trains the {facts.get('stage')} stage; the {stage} stage is needed."
            )
        window = CodecInfo(**facts["codec"]).frames(training.window_seconds)
        return Weights(*load_run(source), window)
    directory = release.resolve(source)
    description = release.read_description(directory)
    loaded = release.load_stage(directory, stage, description)
    return Weights(loaded.params, loaded.config, description[stage]["window"])


def load_adapted(facts: Mapping[str, Any]) -> Params:
    """The model that a LoRA run adapts, from what its config.json says.

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
    if lora.fingerprint(params) != adapted["fingerprint"]:
        raise InputError(
            f"{adapted['source']} is no longer the model that this LoRA run adapts; put that one "
            "back."
        )
    return params


def is_run(source: str | Path) -> bool:
    """Whether this is the folder of a training run, not a model."""
    return (Path(source) / "checkpoints").is_dir()
