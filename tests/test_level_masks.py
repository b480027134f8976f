"""Training with masks as they are when codebooks are filled in one after the other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vampnet_jax as vampnet
from codec_bridge.errors import InputError
from vampnet_jax.training.config import TrainConfig
from vampnet_jax.training.objective import draw_level_masks, masked_sums
from vampnet_jax.training.step import init_state, jitted_step

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


def drawn(n_frames: int = 400) -> tuple[np.ndarray, np.ndarray]:
    keys = jax.random.split(jax.random.key(3), 6)
    numbers = jnp.arange(6, dtype=jnp.uint32)
    mask, levels = draw_level_masks(keys, RATIOS, n_frames, MODEL, numbers)
    return np.asarray(mask), np.asarray(levels)


def test_codebooks_before_the_level_are_known_and_those_after_it_masked():
    mask, levels = drawn()
    np.testing.assert_array_equal(levels, [0, 1, 2, 0, 1, 2])
    for example, level in enumerate(levels + MODEL.n_conditioning_codebooks):
        assert not mask[example, :level].any()
        assert mask[example, level + 1 :].all()
        share = np.cos(np.pi / 2 * RATIOS[example])
        assert mask[example, level].mean() == pytest.approx(share, abs=0.08)


@pytest.mark.parametrize("logit_bytes", [2**27, 4 * 32 * 6 * 5])
def test_only_tokens_of_the_level_are_scored(logit_bytes):
    mask, levels = drawn(20)
    params = vampnet.init(jax.random.key(1), MODEL, codebooks())
    tokens = jax.random.randint(jax.random.key(2), mask.shape, 0, MODEL.vocab_size)
    sums = masked_sums(params, tokens, mask, MODEL, levels=levels, logit_bytes=logit_bytes)
    logits = vampnet.apply(params, jnp.where(mask, MODEL.mask_token, tokens), MODEL)
    loss = -jax.nn.log_softmax(logits)
    given = MODEL.n_conditioning_codebooks
    wanted = [
        sum(
            float(loss[b, level, t, tokens[b, given + level, t]])
            for t in range(20)
            if mask[b, given + level, t]
        )
        for b, level in enumerate(levels)
    ]
    np.testing.assert_allclose(sums.log_loss, wanted, rtol=1e-4)


def test_a_step_is_the_same_in_parts_and_its_gradient_is_that_of_the_levels():
    tokens = jax.random.randint(jax.random.key(2), (6, 5, 20), 0, MODEL.vocab_size)
    whole = TrainConfig(model=MODEL, steps=10, batch_size=6, level_masks=0.5)
    results = []
    for config in (whole, dataclasses.replace(whole, accumulate=3)):
        state, metrics = jitted_step(config)(init_state(config, codebooks()), tokens, 0.0)
        results.append((state.params["head"]["kernel"], metrics["loss"]))
    np.testing.assert_allclose(results[0][0], results[1][0], atol=2e-5)
    assert float(results[0][1]) == pytest.approx(float(results[1][1]), rel=1e-5)
    plain = dataclasses.replace(whole, level_masks=0.0)
    _, metrics = jitted_step(plain)(init_state(plain, codebooks()), tokens, 0.0)
    assert abs(float(metrics["loss"]) - float(results[0][1])) > 1e-4


def test_a_share_above_one_is_refused():
    with pytest.raises(InputError, match=r"level_masks is 1\.5"):
        TrainConfig(model=MODEL, steps=1, level_masks=1.5)
