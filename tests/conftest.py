"""Strict settings for every test: what is wrong must fail, not be papered over."""

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The networks here are small: more threads of PyTorch only fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import jax
import pytest

# Commands keep compiled programs in the user's cache, which is not ours to fill nor to rely on. JAX
# reads this when imported, so tests in this process keep none; those they start share a folder.
_cache = tempfile.TemporaryDirectory(prefix="vampnet-jax-tests-", ignore_cleanup_errors=True)
os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Compilation makes first examples slow, and CI must see the same examples every time.
hypothesis.settings.register_profile("vampnet", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("vampnet")


@pytest.fixture(scope="session")
def small_codec():
    """An untrained DAC: 8 kHz, hop 64, 8 codebooks of 64 codes of 8 dimensions."""
    from small_codecs import random_codec

    return random_codec("dac")


@pytest.fixture
def tiny_recipe(monkeypatch):
    """The scripts of recipes/tiny can be imported, as when they are run."""
    import torch

    from codec_bridge.descript import import_dac

    folder = Path(__file__).parents[1] / "recipes" / "tiny"
    layers = import_dac() and sys.modules["dac.nn.layers"]
    monkeypatch.setattr(layers.Snake1d, "forward", layers.Snake1d.forward)  # snake.py replaces it
    monkeypatch.syspath_prepend(str(folder))
    # Not compiled: after Inductor's kernels XLA has crashed in the same process.
    with torch.compiler.set_stance("force_eager"):
        yield
    for path in folder.glob("*.py"):
        sys.modules.pop(path.stem, None)
