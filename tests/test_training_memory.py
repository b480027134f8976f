"""The same training step in less memory: rematerialisation, accumulation, the loss in parts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vampnet_jax as vampnet
from codec_bridge import InputError
from vampnet_jax.training.config import TrainConfig
from vampnet_jax.training.objective import masked_sums
from vampnet_jax.training.step import init_state, train_step
from vampnet_jax.transformer import UNROLLED_LAYERS, dropout, dropout_seeds

MODEL = vampnet.ModelConfig(
    n_codebooks=3,
    n_conditioning_codebooks=1,
    n_layers=2,
    n_heads=2,
    embedding_dim=16,
    vocab_size=32,
    dropout=0.1,
)
RUN = TrainConfig(
    model=MODEL, batch_size=6, steps=10, schedule="constant", learning_rate=0.01, warmup_steps=1
)


def codebooks() -> jax.Array:
    return jax.random.normal(jax.random.key(9), (3, 32, 8))


def some_tokens(batch: int = 6, n_frames: int = 13) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 32, (batch, 3, n_frames)).astype(np.int32)


@functools.cache
def start():
    # Two steps first, so that no moment is zero: the first steps of Adam look at signs only.
    state = init_state(RUN, codebooks())
    for _ in range(2):
        state, _ = one_step(state, RUN)
    return state


def one_step(state, config):
    return jax.jit(functools.partial(train_step, config=config))(
        state, some_tokens(), np.float32(0)
    )


@functools.cache
def gradient_and_memory(remat: str):
    model = dataclasses.replace(MODEL, remat=remat, n_layers=UNROLLED_LAYERS + 2)
    params = vampnet.init(jax.random.key(1), model, codebooks())
    tokens = jnp.asarray(some_tokens(4, 64))
    mask = jnp.zeros(tokens.shape, bool).at[:, 1:].set(True)

    def loss(params):
        sums = masked_sums(params, tokens, mask, model, dropout_key=jax.random.key(2))
        return jnp.sum(sums.loss)

    compiled = jax.jit(jax.grad(loss)).lower(params).compile()
    return compiled(params), compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("remat", ["attention", "dots", "full"])
def test_what_is_computed_again_changes_memory_and_not_the_gradient(remat):
    wanted, most = gradient_and_memory("none")
    found, memory = gradient_and_memory(remat)
    assert memory < 0.8 * most
    for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        scale = max(float(jnp.abs(a).max()), 1e-6)
        assert float(jnp.abs(a - b).max()) <= 1e-5 * scale


def test_each_policy_keeps_less_than_the_one_before():
    memory = [gradient_and_memory(remat)[1] for remat in ("attention", "dots", "full")]
    assert memory == sorted(memory, reverse=True)


def test_a_policy_may_be_given_as_older_files_have_it_and_unknown_ones_are_refused():
    assert dataclasses.replace(MODEL, remat=True).remat == "full"
    assert dataclasses.replace(MODEL, remat=False).remat == "none"
    with pytest.raises(InputError, match="remat is 'some'"):
        dataclasses.replace(MODEL, remat="some")


@pytest.mark.parametrize("parts", [2, 6])
def test_a_batch_accumulated_in_parts_gives_the_loss_and_the_update_of_the_whole(parts):
    whole, metrics = one_step(start(), RUN)
    summed, same = one_step(start(), dataclasses.replace(RUN, accumulate=parts))
    for name, value in metrics.items():
        np.testing.assert_allclose(same[name], value, rtol=1e-5, err_msg=name)
    for a, b in zip(
        jax.tree.leaves((whole.params, whole.ema)),
        jax.tree.leaves((summed.params, summed.ema)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_a_batch_that_cannot_be_divided_is_refused():
    with pytest.raises(InputError, match="batch_size 6 cannot be accumulated in 4"):
        dataclasses.replace(RUN, accumulate=4)


def test_a_copy_of_the_position_bias_for_each_device_changes_nothing():
    params = vampnet.init(jax.random.key(1), MODEL, codebooks())
    tokens = jnp.asarray(some_tokens())
    mask = jnp.zeros(tokens.shape, bool).at[:, 1:].set(True)

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(params, shards):
        return jax.grad(
            lambda params: jnp.sum(masked_sums(params, tokens, mask, MODEL, shards=shards).loss)
        )(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        gradient(params, 1),
        gradient(params, 3),
    )


def test_the_loss_in_parts_is_the_loss_and_holds_fewer_logits():
    params = vampnet.init(jax.random.key(1), MODEL, codebooks())
    tokens = jnp.asarray(some_tokens(4, 61))  # 61 frames: the last part is not full
    mask = jnp.asarray(np.random.default_rng(1).random(tokens.shape) < 0.5).at[:, 0].set(False)

    def loss(params, logit_bytes):
        sums = masked_sums(
            params, tokens, mask, MODEL, label_smoothing=0.1, logit_bytes=logit_bytes
        )
        return jnp.sum(sums.loss), sums

    def compiled(logit_bytes):
        of = functools.partial(loss, logit_bytes=logit_bytes)
        return jax.jit(jax.value_and_grad(of, has_aux=True)).lower(params).compile()

    logits = 4 * tokens[:, 1:].size * MODEL.vocab_size
    whole, parts = compiled(logits), compiled(logits // 7)
    ((value, sums), gradient), ((same, same_sums), same_gradient) = whole(params), parts(params)
    np.testing.assert_allclose(same, value, rtol=1e-6)
    for a, b in zip(sums, same_sums, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), gradient, same_gradient)


# --- dropout


def test_dropout_zeroes_its_share_and_keeps_the_mean():
    seed = jax.random.bits(jax.random.key(0), (3, 2))
    x = jnp.ones((3, 100, 200))
    y = np.asarray(dropout(x, 0.1, seed))
    zeros = y == 0
    np.testing.assert_allclose(zeros.mean((1, 2)), 0.1, atol=0.01)
    np.testing.assert_allclose(y[~zeros], 1 / 0.9, rtol=1e-6)
    # Independent of example, row and column: a pair is zeroed together 1 % of the time.
    for a, b in (
        (zeros[0], zeros[1]),
        (zeros[:, 1:], zeros[:, :-1]),
        (zeros[:, :, 1:], zeros[:, :, :-1]),
    ):
        assert (a & b).mean() == pytest.approx(0.01, abs=0.002)
    assert dropout(x, 0.1, None) is x


def test_an_examples_dropout_does_not_depend_on_its_batch_mates_and_differs_between_steps():
    params = vampnet.init(jax.random.key(1), MODEL, codebooks())
    tokens = jnp.asarray(some_tokens(4))
    key = jax.random.key(5)
    together = vampnet.apply(params, tokens, MODEL, dropout_key=key)
    keys = jax.vmap(lambda b: jax.random.fold_in(key, b))(jnp.arange(4))
    alone = vampnet.apply(params, tokens[2:3], MODEL, dropout_key=keys[2:3])
    np.testing.assert_allclose(together[2], alone[0], atol=1e-5)
    without = vampnet.apply(params, tokens, MODEL)
    assert np.abs(np.asarray(together - without)).max() > 1e-3
    seeds = np.asarray(dropout_seeds(key, 4, MODEL)).reshape(-1, 2)
    assert len(np.unique(seeds, axis=0)) == 4 * 4 * MODEL.n_layers
