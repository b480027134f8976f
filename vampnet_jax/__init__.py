"""VampNet in JAX/Flax: new music from masked acoustic tokens.

import vampnet_jax as vampnet

model = vampnet.load("tiny")
tokens = model.codec.encode(audio)                    # float32 [B, samples] → int32 [B, C, T]
mask = vampnet.masks.periodic(tokens.shape, period=7)  # True = generate
tokens = vampnet.vamp(model, tokens, mask, jax.random.key(0))
audio = model.codec.decode(tokens)
"""

import importlib
from typing import TYPE_CHECKING, Any

from codec_bridge.errors import InputError

if TYPE_CHECKING:
    from vampnet_jax import masks
    from vampnet_jax.config import ModelConfig
    from vampnet_jax.model import apply, init
    from vampnet_jax.pth import from_torch
    from vampnet_jax.release import Model, Stage, available_models, load, save
    from vampnet_jax.sampling import SamplingOptions, generate
    from vampnet_jax.streaming import stream
    from vampnet_jax.vamping import vamp

__all__ = [
    "InputError",
    "Model",
    "ModelConfig",
    "SamplingOptions",
    "Stage",
    "apply",
    "available_models",
    "from_torch",
    "generate",
    "init",
    "load",
    "masks",
    "save",
    "stream",
    "vamp",
]


# Imported when first used: JAX takes its time, which `vampnet --help` need not wait for.
_HOME = {
    "Model": "release",
    "ModelConfig": "config",
    "SamplingOptions": "sampling",
    "Stage": "release",
    "apply": "model",
    "available_models": "release",
    "from_torch": "pth",
    "generate": "sampling",
    "init": "model",
    "load": "release",
    "save": "release",
    "stream": "streaming",
    "vamp": "vamping",
}


def __getattr__(name: str) -> Any:
    if name == "masks":
        return importlib.import_module("vampnet_jax.masks")
    if name in _HOME:
        return getattr(importlib.import_module(f"vampnet_jax.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
