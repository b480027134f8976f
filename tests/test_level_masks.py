"""Training with masks as they are when codebooks are filled in one after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vampnet_jax as vampnet
from codec_bridge.errors import InputError
from vampnet_jax.training import step
from vampnet_jax.training.config import TrainConfig
from vampnet_jax.training.objective import draw_level_masks

MODEL = vampnet.ModelConfig(
    n_codebooks=5,
    n_conditioning_codebooks=2,
    n_layers=1,
    n_heads=2,
    embedding_dim=16,
    vocab_size=32,
    latent_dim=4,
    dropout=0.0,
)
RATIOS = jnp.linspace(0, 0.9, 6)


def codebooks() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (5, 32, 4))


def test_codebooks_before_the_level_are_known_and_those_after_it_masked():
    keys = jax.random.split(jax.random.key(3), 6)
    mask = draw_level_masks(keys, RATIOS, 400, MODEL, jnp.arange(6, dtype=jnp.uint32))
    for example, level in enumerate([2, 3, 4, 2, 3, 4]):
        assert not mask[example, :level].any()
        assert mask[example, level + 1 :].all()
        share = np.cos(np.pi / 2 * RATIOS[example])
        assert mask[example, level].mean() == pytest.approx(share, abs=0.08)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_that_share_of_the_examples_of_a_step_has_level_masks(share, monkeypatch):
    seen = []
    score = step.masked_sums

    def masked_sums(params, tokens, mask, *rest, **options):
        jax.debug.callback(lambda mask: seen.append(np.asarray(mask)), mask)
        return score(params, tokens, mask, *rest, **options)

    monkeypatch.setattr(step, "masked_sums", masked_sums)
    tokens = jax.random.randint(jax.random.key(2), (64, 5, 20), 0, MODEL.vocab_size)
    config = TrainConfig(model=MODEL, steps=10, batch_size=64, level_masks=share)
    step.train_step(step.init_state(config, codebooks()), tokens, jnp.float32(0), config)
    jax.effects_barrier()
    (mask,) = seen
    levels = 2 + np.arange(64) % 3
    by_level = [
        not row[:level].any() and row[level + 1 :].all()
        for row, level in zip(mask, levels, strict=True)
    ]
    assert np.mean(by_level) == pytest.approx(share, abs=0.15)


def test_a_share_above_one_is_refused():
    with pytest.raises(InputError, match=r"level_masks is 1\.5"):
        TrainConfig(model=MODEL, steps=1, level_masks=1.5)
