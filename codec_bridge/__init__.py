"""Neural audio codecs behind one narrow interface: audio to tokens and tokens to audio.

`load` gives a `Codec`: descript-audio-codec's DAC, or LAC, the codec of the original VampNet.
Importing this package is cheap; PyTorch is imported when a network is first built.
"""

import importlib
from typing import TYPE_CHECKING, Any

from codec_bridge.errors import InputError

if TYPE_CHECKING:
    import codec_bridge.audio as audio
    from codec_bridge.codec import Codec
    from codec_bridge.files import load, save

__all__ = ["Codec", "InputError", "audio", "load", "save"]

_HOME = {"Codec": "codec", "load": "files", "save": "files"}


def __getattr__(name: str) -> Any:
    if name == "audio":
        return importlib.import_module("codec_bridge.audio")
    if name in _HOME:
        return getattr(importlib.import_module(f"codec_bridge.{_HOME[name]}"), name)
    raise AttributeError(f"module 'codec_bridge' has no attribute {name!r}")
