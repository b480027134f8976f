"""Training with masks as they are while codebooks, or the gaps of a prompt, are filled in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vampnet_jax as vampnet
from codec_bridge.errors import InputError
from vampnet_jax.training import step
from vampnet_jax.training.config import TrainConfig
from vampnet_jax.training.objective import draw_gaps, draw_level_masks

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


def masks_of_step(monkeypatch, **shares: float) -> np.ndarray:
    """The masks `[64, C, T]` that a training step scores."""
    seen = []
    score = step.masked_sums

    def masked_sums(params, tokens, mask, *rest, **options):
        jax.debug.callback(lambda mask: seen.append(np.asarray(mask)), mask)
        return score(params, tokens, mask, *rest, **options)

    monkeypatch.setattr(step, "masked_sums", masked_sums)
    tokens = jax.random.randint(jax.random.key(2), (64, 5, 20), 0, MODEL.vocab_size)
    config = TrainConfig(model=MODEL, steps=10, batch_size=64, **shares)
    step.train_step(step.init_state(config, codebooks()), tokens, jnp.float32(0), config)
    jax.effects_barrier()
    (masks,) = seen
    return masks


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_that_share_of_the_examples_of_a_step_has_level_masks(share, monkeypatch):
    levels = 2 + np.arange(64) % 3
    by_level = [
        not row[:level].any() and row[level + 1 :].all()
        for row, level in zip(masks_of_step(monkeypatch, level_masks=share), levels, strict=True)
    ]
    assert np.mean(by_level) == pytest.approx(share, abs=0.15)


@pytest.mark.parametrize(("level", "prompt"), [(0.3, 0.4), (0.0, 1.0), (0.0, 0.0), (0.5, 0.5)])
def test_the_kinds_of_masks_share_the_examples_of_a_step(level, prompt, monkeypatch):
    def only(*frames):  # a mask that shows which kind it is
        at = jnp.isin(jnp.arange(20), jnp.array(frames))
        return lambda keys, *_: jnp.broadcast_to(at, (len(keys), 5, 20))

    monkeypatch.setattr(step, "draw_masks", only(0, 1))
    monkeypatch.setattr(step, "draw_gaps", lambda keys, n: jnp.tile(jnp.arange(n) == 1, (64, 1)))
    monkeypatch.setattr(step, "draw_level_masks", only(2))
    masks = masks_of_step(monkeypatch, level_masks=level, prompt_masks=prompt)[:, 0]
    shares = [masks[:, 0].mean(), (masks[:, 1] & ~masks[:, 0]).mean(), masks[:, 2].mean()]
    assert sum(shares) == 1
    np.testing.assert_allclose(shares, [1 - level - prompt, prompt, level], atol=0.17)


def test_frames_of_a_prompt_come_again_after_a_period():
    gaps = np.asarray(draw_gaps(jax.random.split(jax.random.key(4), 200), 80))
    shapes = set()
    for gap in gaps:
        period = next(p for p in range(2, 17) if (gap[p:] == gap[:-p]).all())
        starts = np.flatnonzero(gap[:-1] & ~gap[1:])
        assert (np.diff(starts) == period).all()  # one run of kept frames per period
        shapes.add((period, int(period - gap[:period].sum())))
    assert {period for period, _ in shapes} == set(range(2, 17))
    assert {kept for _, kept in shapes} == {1, 2, 3, 4}


def test_gaps_of_an_example_do_not_depend_on_the_others():
    keys = jax.random.split(jax.random.key(4), 5)
    np.testing.assert_array_equal(draw_gaps(keys[2:3], 50), draw_gaps(keys, 50)[2:3])


def test_prompt_masks_hide_only_what_lies_in_gaps_and_is_masked_at_random(monkeypatch):
    gaps = jnp.arange(20) % 4 >= 2
    monkeypatch.setattr(step, "draw_gaps", lambda keys, n: jnp.tile(gaps, (len(keys), 1)))
    plain = masks_of_step(monkeypatch)
    np.testing.assert_array_equal(
        masks_of_step(monkeypatch, prompt_masks=1.0), plain & np.asarray(gaps)
    )


@pytest.mark.parametrize("name", ["level_masks", "prompt_masks"])
def test_a_share_above_one_is_refused(name):
    with pytest.raises(InputError, match=rf"{name} is 1\.5"):
        TrainConfig(model=MODEL, steps=1, **{name: 1.5})


def test_shares_above_one_together_are_refused():
    with pytest.raises(InputError, match="together they can be 1 at most"):
        TrainConfig(model=MODEL, steps=1, level_masks=0.6, prompt_masks=0.5)
