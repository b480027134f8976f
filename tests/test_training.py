"""The objective, the optimiser and the step: what is learnt and from what randomness."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vampnet_jax as vampnet
from codec_bridge import InputError
from vampnet_jax.training.config import PRESETS, TrainConfig, preset_config
from vampnet_jax.training.objective import draw_masks, mask_ratios, masked_sums, metrics_by_ratio
from vampnet_jax.training.optimizer import optimizer, schedule
from vampnet_jax.training.step import init_state, model_params, train_step, with_codebooks

COARSE = vampnet.ModelConfig(
    n_codebooks=3, n_layers=1, n_heads=2, embedding_dim=16, vocab_size=32, dropout=0.05
)
FINE = dataclasses.replace(COARSE, n_conditioning_codebooks=1)
N_FRAMES = 12


def codebooks() -> jax.Array:
    return jax.random.normal(jax.random.key(9), (3, 32, 8))


def config(model: vampnet.ModelConfig = COARSE, **changes) -> TrainConfig:
    recipe = {
        "batch_size": 4,
        "steps": 100,
        "schedule": "constant",
        "learning_rate": 1e-2,
        "warmup_steps": 1,
        "ema_decay": 0.9,
    }
    return TrainConfig(model=model, **{**recipe, **changes})


def some_tokens(batch: int = 4, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 32, (batch, 3, N_FRAMES)).astype(np.int32)


@functools.cache
def compiled(config: TrainConfig):
    return jax.jit(functools.partial(train_step, config=config))


def step(state, tokens, config, done=0.0):
    return compiled(config)(state, tokens, np.float32(done))


def test_mask_ratios_cover_zero_to_one_evenly_in_every_stretch_of_the_run():
    for start in (0, 1000, 2**32 - 50):
        numbers = (np.arange(start, start + 100) % 2**32).astype(np.uint32)
        ratios = np.sort(mask_ratios(jnp.uint32(7), jnp.asarray(numbers)))
        assert ratios.min() >= 0
        assert ratios.max() < 1
        assert np.abs(ratios - (np.arange(100) + 0.5) / 100).max() < 0.03


def test_the_global_batch_of_every_step_is_stratified():
    # Example b of step s is number s·B + b, whichever process or device has it.
    for batch in (8, 25, 256):
        for step in (0, 1, 999):
            numbers = step * batch + np.arange(batch)
            ratios = np.sort(mask_ratios(jnp.uint32(3), jnp.asarray(numbers, jnp.uint32)))
            worst = np.abs(ratios - (np.arange(batch) + 0.5) / batch).max()
            assert worst < 1.5 / batch + 0.01
            by_quarter = np.histogram(ratios, bins=4, range=(0, 1))[0]
            assert np.abs(by_quarter - batch / 4).max() <= 2


def test_tokens_are_masked_with_probability_cos_of_half_pi_r_and_conditioning_ones_never():
    ratios = jnp.array([0.0, 0.3, 0.5, 0.9])
    mask = draw_masks(jax.random.split(jax.random.key(0), 4), ratios, 4000, FINE)
    assert mask.shape == (4, 3, 4000)
    assert not mask[:, 0].any()
    np.testing.assert_allclose(
        mask[:, 1:].mean((1, 2)), np.cos(np.pi / 2 * np.asarray(ratios)), atol=0.02
    )


@pytest.mark.parametrize("model", [COARSE, FINE], ids=["coarse", "fine"])
def test_losses_and_hits_count_masked_tokens_only_and_agree_with_a_plain_computation(model):
    params = vampnet.init(jax.random.key(1), model, codebooks())
    tokens = some_tokens()
    mask = np.array(jax.random.bernoulli(jax.random.key(2), 0.4, tokens.shape))
    mask[:, : model.n_conditioning_codebooks] = False
    sums = masked_sums(params, jnp.asarray(tokens), jnp.asarray(mask), model, label_smoothing=0.1)
    hidden = np.where(mask, model.mask_token, tokens)
    logits = np.asarray(vampnet.apply(params, jnp.asarray(hidden), model))
    given = model.n_conditioning_codebooks
    labels, scored = tokens[:, given:], mask[:, given:]
    smooth = optax.smooth_labels(jax.nn.one_hot(labels, 32), 0.1)
    loss = np.where(scored, optax.softmax_cross_entropy(logits, smooth), 0)
    log_loss = np.asarray(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
    rank = (np.asarray(logits) > np.take_along_axis(np.asarray(logits), labels[..., None], -1)).sum(
        -1
    )
    np.testing.assert_allclose(sums.tokens, scored.sum((1, 2)))
    np.testing.assert_allclose(sums.loss, loss.sum((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(sums.log_loss, np.where(scored, log_loss, 0).sum((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(sums.top_1, ((rank == 0) & scored).sum((1, 2)))
    np.testing.assert_allclose(sums.top_k, ((rank < 25) & scored).sum((1, 2)))


def test_accuracies_are_told_apart_by_mask_ratio_and_a_batch_without_masks_has_loss_zero():
    params = vampnet.init(jax.random.key(1), COARSE, codebooks())
    tokens = jnp.asarray(some_tokens())
    sums = masked_sums(params, tokens, jnp.zeros(tokens.shape, bool), COARSE)
    metrics = metrics_by_ratio(sums, jnp.array([0.1, 0.2, 0.6, 0.7]))
    assert metrics["loss"] == 0
    assert np.isnan(metrics["top1/r<0.5"])
    hits = sums._replace(tokens=jnp.full(4, 2.0), top_1=jnp.array([2.0, 1.0, 0.0, 1.0]))
    metrics = metrics_by_ratio(hits, jnp.array([0.1, 0.2, 0.6, 0.7]))
    assert metrics["top1/r<0.5"] == metrics["top1/r0-0.25"] == 0.75
    assert metrics["top1/r>=0.5"] == metrics["top1/r0.5-0.75"] == 0.25
    assert np.isnan(metrics["top1/r0.75-1"])


def test_training_learns_a_pattern_and_never_touches_the_codebooks():
    run = config()
    state = init_state(run, codebooks())
    notes = np.random.default_rng(0).integers(0, 32, (4, 3, 1))
    tokens = np.repeat(notes, N_FRAMES, axis=2)  # held notes: neighbours tell what is masked
    history = []
    for _ in range(120):
        state, metrics = step(state, tokens.astype(np.int32), run)
        history.append(metrics)
    assert history[0]["log_loss"] > 3
    assert np.mean([m["log_loss"] for m in history[-10:]]) < 1
    assert np.mean([m["top1/r>=0.5"] for m in history[-10:]]) > 0.8
    np.testing.assert_array_equal(state.codebooks, codebooks())
    np.testing.assert_array_equal(model_params(state, run)["embedding"]["codebooks"], codebooks())
    assert "codebooks" not in state.params["embedding"]


def test_a_step_is_a_function_of_seed_step_and_batch_alone():
    run = config()
    state = init_state(run, codebooks())
    first, metrics = step(state, some_tokens(), run)
    again, same = step(state, some_tokens(), run)
    assert metrics["loss"] == same["loss"]
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    _, other_masks = step(state._replace(step=jnp.int32(1)), some_tokens(), run)
    assert metrics["loss"] != other_masks["loss"]
    _, other_seed = step(state, some_tokens(), dataclasses.replace(run, seed=1))
    assert metrics["loss"] != other_seed["loss"]


def test_dropout_and_label_smoothing_are_on_in_training():
    run = config()
    plain = config(dataclasses.replace(COARSE, dropout=0.0), label_smoothing=0.0)
    state = init_state(run, codebooks())
    _, metrics = step(state, some_tokens(), run)
    _, without = step(state, some_tokens(), plain)
    assert without["loss"] == without["log_loss"]
    assert abs(metrics["log_loss"] - without["log_loss"]) > 1e-4
    assert abs(metrics["loss"] - metrics["log_loss"]) > 1e-4


def test_gradients_are_clipped_by_their_global_norm_and_weights_decay():
    params = {"a": jnp.array([3.0]), "b": jnp.array([-2.0])}
    gradient = {"a": jnp.array([30.0]), "b": jnp.array([40.0])}
    with jax.numpy_dtype_promotion("standard"):
        rule = optimizer(config(gradient_clip=5.0, weight_decay=0.01))
        updates, moments = rule.update(gradient, rule.init(params), params)
    np.testing.assert_allclose(moments[1].mu["a"], 0.1 * 30.0 * 5 / 50, rtol=1e-5)
    np.testing.assert_allclose(updates["a"], 1.0 + 0.01 * 3.0, rtol=1e-4)  # Adam's first is ±1
    np.testing.assert_allclose(updates["b"], 1.0 - 0.01 * 2.0, rtol=1e-4)


def test_the_moving_average_follows_the_weights_slowly():
    run = config()
    state = init_state(run, codebooks())
    for _ in range(5):
        before, state = state, step(state, some_tokens(), run)[0]
    decay = min(0.9, 5 / 14)
    expected = decay * before.ema["norm"] + (1 - decay) * state.params["norm"]
    np.testing.assert_allclose(state.ema["norm"], expected, rtol=1e-5)
    assert init_state(config(ema_decay=0.0), codebooks()).ema == {}


def test_learning_rates_are_those_of_the_papers():
    def rate(step, done=0.0, **changes):
        value = schedule(config(**changes))(jnp.int32(step), jnp.float32(done))
        return float(value)

    noam = {"schedule": "noam", "learning_rate": 2.0, "warmup_steps": 100}
    assert rate(0, **noam) == pytest.approx(2.0 * 16**-0.5 * 100**-1.5)
    assert rate(99, **noam) == pytest.approx(2.0 * 16**-0.5 * 0.1)
    assert rate(399, **noam) == pytest.approx(2.0 * 16**-0.5 * 0.05)
    cosine = {"schedule": "cosine", "learning_rate": 1.0, "warmup_steps": 10}
    assert rate(4, **cosine) == pytest.approx(0.5)
    assert rate(50, 0.5, **cosine) == pytest.approx(0.505)
    assert rate(100, 1.0, **cosine) == pytest.approx(0.01)
    assert rate(50, 0.9, schedule="constant", learning_rate=0.3) == pytest.approx(0.3)


def test_a_run_is_done_by_steps_or_by_time_whichever_comes_first():
    run = config(steps=100, minutes=2.0)
    assert run.done(50, 0.0) == 0.5
    assert run.done(50, 90.0) == 0.75


@pytest.mark.parametrize(("preset", "stage"), PRESETS)
def test_every_preset_fits_the_published_codec_and_can_be_changed(preset, stage):
    run = preset_config(
        preset,
        stage,
        {"steps": 7, "learning_rate": 0.5, "n_layers": 3},
        codec_codebooks=14,
        codebook_size=1024,
        latent_dim=8,
    )
    assert (run.steps, run.learning_rate, run.model.n_layers) == (7, 0.5, 3)
    assert run.model.n_codebooks == (4 if stage == "coarse" else 14)
    assert run.model.n_conditioning_codebooks == (0 if stage == "coarse" else 4)
    assert TrainConfig.from_dict(run.to_dict()) == run


@pytest.mark.parametrize(
    ("preset", "stage", "params"), [("coarse", "coarse", 333e6), ("fine", "fine", 276e6)]
)
def test_the_published_presets_have_the_published_sizes(preset, stage, params):
    run = preset_config(preset, stage, {}, codec_codebooks=14, codebook_size=1024, latent_dim=8)
    state = jax.eval_shape(
        functools.partial(init_state, run), jax.ShapeDtypeStruct((14, 1024, 8), jnp.float32)
    )
    count = sum(x.size for x in jax.tree.leaves(state.params))
    assert count == pytest.approx(params, rel=0.01)


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 0},
        {"learning_rate": -1.0},
        {"learning_rate": float("nan")},
        {"steps": None},
        {"steps": 0},
        {"minutes": -1.0},
        {"label_smoothing": 1.0},
        {"seed": -1},
        {"schedule": "linear"},
    ],
)
def test_impossible_settings_are_refused_in_one_sentence(changes):
    with pytest.raises(InputError, match=next(iter(changes))):
        config(**changes)


def test_a_preset_of_the_other_stage_or_too_many_codebooks_are_refused():
    sizes = {"codec_codebooks": 3, "codebook_size": 32, "latent_dim": 8}
    with pytest.raises(InputError, match="for the fine stage, not the coarse one"):
        preset_config("fine", "coarse", {"steps": 1}, **sizes)
    with pytest.raises(InputError, match="4 codebooks"):
        preset_config("tiny", "coarse", {"steps": 1}, **sizes)


def test_the_step_gives_the_same_on_two_devices_with_the_batch_sharded():
    run = config(dataclasses.replace(COARSE, dropout=0.1), label_smoothing=0.0)
    state = init_state(run, codebooks())
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    everywhere = jax.device_put(state, jax.sharding.NamedSharding(mesh, spec()))
    tokens = jax.device_put(some_tokens(), jax.sharding.NamedSharding(mesh, spec("data")))
    one, metrics = step(state, some_tokens(), run)
    two, sharded = step(everywhere, tokens, run)
    assert float(metrics["loss"]) == pytest.approx(float(sharded["loss"]), rel=1e-5)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-5),
        one,
        two,
    )
    assert with_codebooks(two.params, two.codebooks)["head"]["kernel"].shape == (16, 3, 32)


def test_training_starts_from_the_codes_and_the_frequencies_of_tokens():
    run = config()
    counts = 1 + np.arange(codebooks().shape[0] * run.model.vocab_size, dtype=np.float32)
    frequencies = counts.reshape(codebooks().shape[0], -1)
    frequencies /= frequencies.sum(axis=1, keepdims=True)
    state = init_state(run, codebooks(), jnp.asarray(frequencies))
    used = slice(run.model.n_conditioning_codebooks, run.model.n_codebooks)
    np.testing.assert_allclose(state.params["head"]["bias"], np.log(frequencies[used]), rtol=1e-5)
    plain = init_state(run, codebooks())
    assert not np.allclose(state.params["embedding"]["kernel"], plain.params["embedding"]["kernel"])
