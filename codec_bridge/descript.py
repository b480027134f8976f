"""Import descript-audio-codec, also where its unused dependency torchaudio cannot load.

`import dac` imports audiotools, which imports torchaudio. Its wheels need CUDA libraries that a
CPU build of torch does not bring, so the import fails there although the codec never calls it.
An empty stand-in takes its place for the duration of the import.
"""

import contextlib
import functools
import importlib
import sys
import types
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@functools.cache
def import_dac() -> types.ModuleType:
    """Return the `dac` package of descript-audio-codec."""
    with stand_in_for_broken_torchaudio(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("dac")


@contextlib.contextmanager
def stand_in_for_broken_torchaudio(*, empty: bool = True) -> Iterator[None]:
    """Within it `import torchaudio` gives the package, or something else if that cannot load.

    Args:
      empty: an empty package; otherwise it is as if it were not installed.
    """
    try:
        importlib.import_module("torchaudio")
    except (ImportError, OSError, AttributeError, RuntimeError):
        before = set(sys.modules)
        stand_in = types.ModuleType("torchaudio") if empty else None
        sys.modules["torchaudio"] = stand_in  # type: ignore[assignment]
        try:
            yield
        finally:
            del sys.modules["torchaudio"]
            for name in set(sys.modules) - before:
                if name.startswith("torchaudio."):
                    del sys.modules[name]
    else:
        yield


def build_dac(sizes: Mapping[str, Any]) -> "torch.nn.Module":
    """descript-audio-codec's DAC with plain convolutions: their weight normalisation is folded."""
    with _plain_convolutions():
        return import_dac().model.DAC(
            **{name: list(v) if isinstance(v, tuple) else v for name, v in sizes.items()}
        )


@contextlib.contextmanager
def _plain_convolutions() -> Iterator[None]:
    """Within it DAC's layers are made without weight normalisation.

    Made with it and removed, norms would be computed of weights that are not there yet.
    """
    layers = import_dac().nn.layers
    original, layers.weight_norm = layers.weight_norm, lambda convolution: convolution
    try:
        yield
    finally:
        layers.weight_norm = original
