"""The sizes that docs/training.md and docs/fine-tuning.md state, counted without any memory."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from vampnet_jax import lora
from vampnet_jax.training.config import preset_config
from vampnet_jax.training.step import init_state

DOCS = Path(__file__).parents[1] / "docs"


def millions(preset: str, stage: str, **changes) -> float:
    sizes = {"codec_codebooks": 14, "codebook_size": 1024, "latent_dim": 8}
    config = preset_config(preset, stage, {"steps": 1, **changes}, **sizes)
    codebooks = jax.ShapeDtypeStruct((14, 1024, 8), jnp.float32)
    state = jax.eval_shape(functools.partial(init_state, config), codebooks)
    return sum(x.size for x in jax.tree.leaves(state.params)) / 1e6


@pytest.mark.parametrize("preset", ["small", "base", "coarse"])
def test_parameters_of_every_preset_are_those_in_the_table(preset):
    text = (DOCS / "training.md").read_text()
    ((coarse, fine),) = re.findall(
        rf"^\| `{preset}`(?:, `fine`)? \| ([\d.]+) \| ([\d.]+) \|$", text, re.M
    )
    assert float(coarse) == pytest.approx(millions(preset, "coarse"), abs=0.05)
    other = "fine" if preset == "coarse" else preset
    assert float(fine) == pytest.approx(millions(other, "fine"), abs=0.05)


def test_adapters_of_the_published_models_have_the_stated_sizes():
    text = (DOCS / "fine-tuning.md").read_text()
    ((coarse, fine),) = re.findall(r"(\d\.\d) M \(coarse\) and (\d\.\d) M \(fine\)", text)
    rank_8 = lora.LoraConfig()
    assert float(coarse) == pytest.approx(millions("coarse", "coarse", lora=rank_8), abs=0.05)
    assert float(fine) == pytest.approx(millions("fine", "fine", lora=rank_8), abs=0.05)
