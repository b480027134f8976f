"""VampNet in JAX/Flax: new music from masked acoustic tokens.

import vampnet_jax as vampnet

model = vampnet.load("tiny")
tokens = model.codec.encode(audio)                    # float32 [B, samples] → int32 [B, C, T]
mask = vampnet.masks.periodic(tokens.shape, period=7)  # True = generate
tokens = vampnet.vamp(model, tokens, mask, jax.random.key(0))
audio = model.codec.decode(tokens)
"""

from codec_bridge.errors import InputError
from vampnet_jax import masks
from vampnet_jax.config import ModelConfig
from vampnet_jax.model import apply, init
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


def __getattr__(name: str):
    if name == "from_torch":  # the only part that needs torch
        from vampnet_jax.pth import from_torch

        return from_torch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
