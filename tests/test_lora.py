"""LoRA: adapters beside a model that stays as it is, trained, kept and merged."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vampnet_jax as vampnet
from codec_bridge import InputError
from vampnet_jax import lora
from vampnet_jax.training.config import TrainConfig
from vampnet_jax.training.step import freeze, init_state, model_params, train_step

MODEL = vampnet.ModelConfig(
    n_codebooks=3, n_layers=2, n_heads=2, embedding_dim=16, vocab_size=32, dropout=0.05
)
EVERYTHING = lora.LoraConfig(rank=3, alpha=6.0, targets=tuple(lora.INPUT_AXES))


def codebooks() -> jax.Array:
    return jax.random.normal(jax.random.key(9), (3, 32, 8))


def base_params() -> dict:
    return vampnet.init(jax.random.key(1), MODEL, codebooks())


def random_adapters(config: lora.LoraConfig) -> lora.Adapters:
    adapters = lora.init(jax.random.key(2), MODEL, config)
    draw = np.random.default_rng(3).standard_normal
    return jax.tree.map(lambda x: jnp.asarray(0.2 * draw(x.shape), jnp.float32), adapters)


def assert_close(found, wanted) -> None:
    """Equal to 1e-5 of the largest value."""
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max()),
        found,
        wanted,
    )


def some_tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 32, (4, 3, 12)).astype(np.int32)


def fine_tuning(**changes) -> TrainConfig:
    recipe = {
        "lora": lora.LoraConfig(rank=2),
        "batch_size": 4,
        "steps": 10,
        "schedule": "constant",
        "learning_rate": 1e-2,
        "warmup_steps": 1,
        "ema_decay": 0.9,
    }
    return TrainConfig(**{"model": MODEL, **recipe, **changes})


def begin(config: TrainConfig):
    state = init_state(config, codebooks())
    return state._replace(frozen=freeze(base_params(), config))


def test_attached_adapters_compute_what_merged_ones_do():
    params, adapters = base_params(), random_adapters(EVERYTHING)
    tokens = jnp.asarray(some_tokens())
    attached = vampnet.apply(lora.attach(params, adapters, EVERYTHING), tokens, MODEL)
    merged = vampnet.apply(lora.merge(params, adapters, EVERYTHING), tokens, MODEL)
    plain = vampnet.apply(params, tokens, MODEL)
    assert np.abs(merged - plain).max() > 0.1
    assert_close(attached, merged)


def test_what_is_merged_on_the_host_is_what_is_merged_under_jit():
    params, adapters = base_params(), random_adapters(EVERYTHING)
    merged = lora.merge_on_host(params, adapters, EVERYTHING)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(merged))
    assert_close(merged, lora.merge(params, adapters, EVERYTHING))
    np.testing.assert_array_equal(params["blocks"]["key"], base_params()["blocks"]["key"])
    one = lora.LoraConfig(rank=1, targets=("up",))
    pair = random_adapters(one)["up"]
    by_hand = np.asarray(params["blocks"]["up"]) + np.float32(one.scale) * (
        np.asarray(pair["a"])[..., 0][:, :, None, None] * np.asarray(pair["b"])
    ).reshape(params["blocks"]["up"].shape)
    again = lora.merge_on_host(params, {"up": pair}, one)["blocks"]["up"]
    np.testing.assert_array_equal(again, by_hand)


def test_new_adapters_change_nothing():
    params = base_params()
    adapters = lora.init(jax.random.key(0), MODEL, EVERYTHING)
    tokens = jnp.asarray(some_tokens())
    np.testing.assert_array_equal(
        vampnet.apply(lora.attach(params, adapters, EVERYTHING), tokens, MODEL),
        vampnet.apply(params, tokens, MODEL),
    )


def test_a_model_with_adapters_beside_it_is_sampled_from_as_if_they_were_merged():
    params, adapters = base_params(), random_adapters(EVERYTHING)
    tokens = jnp.asarray(some_tokens())
    options = vampnet.SamplingOptions(steps=3, sample_cutoff=0.0, mask_temperature=0.0)
    samples = [
        vampnet.generate(p, tokens, tokens > 9, jax.random.key(0), MODEL, options)
        for p in (
            lora.attach(params, adapters, EVERYTHING),
            lora.merge(params, adapters, EVERYTHING),
        )
    ]
    np.testing.assert_array_equal(*samples)


def test_only_adapters_are_trained_and_have_moments():
    config = fine_tuning()
    state = before = begin(config)
    step = jax.jit(functools.partial(train_step, config=config))
    for _ in range(3):
        state, metrics = step(state, some_tokens(), np.float32(0))
    assert np.isfinite(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, state.frozen, before.frozen)
    np.testing.assert_array_equal(state.codebooks, codebooks())
    assert set(state.params) == set(config.lora.targets)
    assert all(np.abs(pair["b"]).max() > 0 for pair in state.params.values())
    shapes = {x.shape for x in jax.tree.leaves(state.moments) if x.ndim}
    assert shapes == {x.shape for x in jax.tree.leaves(state.params)}
    merged = lora.merge(base_params(), state.ema, config.lora)
    tokens = jnp.asarray(some_tokens())
    assert_close(
        vampnet.apply(model_params(state, config), tokens, MODEL),
        vampnet.apply(merged, tokens, MODEL),
    )


def test_adapters_get_the_gradient_that_merging_would_give():
    config = fine_tuning(
        model=dataclasses.replace(MODEL, dropout=0.0), lora=EVERYTHING, gradient_clip=1e9
    )
    base, adapters = base_params(), random_adapters(EVERYTHING)
    tokens = jnp.asarray(some_tokens())

    def loss(adapters, put):
        params = put(base, adapters, EVERYTHING)
        return jnp.square(vampnet.apply(params, tokens, config.model)).mean()

    assert_close(*(jax.grad(loss)(adapters, put) for put in (lora.attach, lora.merge)))


@pytest.mark.parametrize("dtype", ["bfloat16", "bfloat16-products"])
def test_frozen_matrices_are_kept_in_the_dtype_that_they_are_used_in(dtype):
    model = dataclasses.replace(MODEL, dtype=dtype)
    frozen = freeze(base_params(), fine_tuning(model=model))
    assert {x.dtype for n, x in frozen["blocks"].items() if not n.endswith("norm")} == {
        jnp.dtype(jnp.bfloat16)
    }
    assert frozen["blocks"]["attention_norm"].dtype == frozen["norm"].dtype == jnp.float32
    assert "codebooks" not in frozen["embedding"]
    tokens = jnp.asarray(some_tokens())
    rounded = frozen | {"embedding": frozen["embedding"] | {"codebooks": codebooks()}}
    np.testing.assert_array_equal(
        vampnet.apply(rounded, tokens, model), vampnet.apply(base_params(), tokens, model)
    )


def test_settings_of_a_run_come_back_from_json():
    config = fine_tuning(lora=EVERYTHING)
    assert TrainConfig.from_dict(config.to_dict()) == config


def test_impossible_adapters_are_refused_in_one_sentence():
    for changes, words in (
        ({"rank": 0}, "rank is 0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"targets": ("query", "mouth")}, "mouth"),
    ):
        with pytest.raises(InputError, match=words):
            lora.LoraConfig(**changes)
