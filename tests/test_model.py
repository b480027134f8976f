"""The model's parameters and program are what the paper and the original's files say."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vampnet_jax as vampnet
from codec_bridge.errors import InputError
from vampnet_jax import model, transformer
from vampnet_jax.transformer import relative_position_buckets

CONFIG = vampnet.ModelConfig(
    n_codebooks=5, n_conditioning_codebooks=2, n_layers=3, n_heads=2, embedding_dim=16,
    vocab_size=30, latent_dim=4, dropout=0.5,
)  # fmt: skip
OFFICIAL = json.loads(
    (Path(__file__).parent / "golden" / "official_state_dict_shapes.json").read_text()
)


@pytest.fixture(scope="module")
def params():
    return model.init(jax.random.key(0), CONFIG, jax.random.normal(jax.random.key(1), (9, 30, 4)))


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(2), (2, 5, 12), 0, 31)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("coarse", vampnet.ModelConfig(n_codebooks=4)),
        ("c2f", vampnet.ModelConfig(n_codebooks=14, n_conditioning_codebooks=4, n_layers=16)),
    ],
)
def test_full_size_models_have_the_originals_parameters(name, config):
    codebooks = jax.ShapeDtypeStruct((14, 1024, 8), jnp.float32)
    ours = jax.eval_shape(lambda c: vampnet.init(jax.random.key(0), config, c), codebooks)
    ours["embedding"].pop("codebooks")  # the codec's, not in the original's file
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(ours))
    # Adapters and the gains of the weight norm are folded into the weights.
    theirs = {k: v for k, v in OFFICIAL[name].items() if "lora_" not in k and "weight_g" not in k}
    assert count == sum(map(math.prod, theirs.values()))


def test_apply_gives_float32_logits_of_the_predicted_codebooks(params, tokens):
    logits = vampnet.apply(params, tokens, CONFIG)
    assert logits.shape == (2, 3, 12, 30)
    assert logits.dtype == jnp.float32
    assert jnp.isfinite(logits).all()


def test_position_buckets_follow_the_logarithmic_formula():
    n_frames = 3000
    buckets = relative_position_buckets(n_frames)
    m = np.arange(n_frames, dtype=np.float32)
    with np.errstate(divide="ignore"):
        wide = 8 + np.trunc(np.log(m / 8) / np.log(np.float32(16)) * 8)
    one_side = np.where(m < 8, m, np.minimum(wide, 15))
    np.testing.assert_array_equal(buckets[:, 0], one_side)  # keys before the query
    np.testing.assert_array_equal(buckets[0, 1:], one_side[1:] + 16)  # and after it


def test_each_example_is_computed_on_its_own(params, tokens):
    both = vampnet.apply(params, tokens, CONFIG)
    np.testing.assert_allclose(vampnet.apply(params, tokens[1:], CONFIG)[0], both[1], atol=1e-5)


def test_remat_changes_memory_not_values(params, tokens):
    def loss(params, config):
        logits = vampnet.apply(params, tokens, config, dropout_key=jax.random.key(3))
        return jnp.mean(jnp.square(logits))

    with_remat = dataclasses.replace(CONFIG, remat=True)
    value, grads = jax.value_and_grad(loss)(params, CONFIG)
    value_again, grads_again = jax.value_and_grad(loss)(params, with_remat)
    np.testing.assert_allclose(value, value_again, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, grads_again)


@pytest.mark.parametrize("dtype", ["bfloat16", "bfloat16-products"])
def test_bfloat16_computes_nearly_the_same_and_returns_float32(params, tokens, dtype):
    want = vampnet.apply(params, tokens, CONFIG)
    got = vampnet.apply(params, tokens, dataclasses.replace(CONFIG, dtype=dtype))
    assert got.dtype == jnp.float32
    assert 0 < jnp.abs(got - want).max() < 0.05 * jnp.abs(want).max()


def test_products_are_rounded_less_often_than_everything(params, tokens):
    want = vampnet.apply(params, tokens, CONFIG)
    dtypes = ("bfloat16", "bfloat16-products")
    logits = [vampnet.apply(params, tokens, dataclasses.replace(CONFIG, dtype=d)) for d in dtypes]
    everything, products = (float(jnp.square(got - want).mean()) for got in logits)
    assert products < everything


def test_a_loop_over_the_blocks_computes_what_they_do_one_after_the_other(
    params, tokens, monkeypatch
):
    def loss(params):
        return jnp.mean(jnp.square(model.frame_major_logits(params, tokens, CONFIG)))

    def loops():
        traced = jax.make_jaxpr(lambda params: loss(params))(params)  # anew each time
        return [e.params["unroll"] for e in traced.eqns if e.primitive.name == "scan"]

    assert CONFIG.n_layers <= transformer.UNROLLED_LAYERS
    wanted, unrolled = jax.value_and_grad(loss)(params), loops()
    monkeypatch.setattr(transformer, "UNROLLED_LAYERS", 0)
    assert unrolled != loops() == [1]
    found = jax.value_and_grad(loss)(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), wanted, found)


def test_gradients_reach_every_parameter_but_the_codecs_vectors(params, tokens):
    grads = jax.grad(lambda p: jnp.sum(vampnet.apply(p, tokens, CONFIG) ** 2))(params)
    frozen = grads["embedding"].pop("codebooks")
    assert not frozen.any()
    for path, grad in jax.tree.leaves_with_path(grads):
        assert jnp.abs(grad).max() > 0, jax.tree_util.keystr(path)


def test_dropout_needs_a_key_and_differs_between_keys_and_layers(params, tokens):
    plain = vampnet.apply(params, tokens, CONFIG)
    np.testing.assert_array_equal(plain, vampnet.apply(params, tokens, CONFIG))
    one = vampnet.apply(params, tokens, CONFIG, dropout_key=jax.random.key(0))
    again = vampnet.apply(params, tokens, CONFIG, dropout_key=jax.random.key(0))
    other = vampnet.apply(params, tokens, CONFIG, dropout_key=jax.random.key(1))
    legacy = vampnet.apply(params, tokens, CONFIG, dropout_key=jax.random.PRNGKey(0))
    np.testing.assert_array_equal(legacy, one)
    with pytest.raises(ValueError, match="keys for"):
        vampnet.apply(params, tokens, CONFIG, dropout_key=jax.random.split(jax.random.key(0), 7))
    np.testing.assert_array_equal(one, again)
    assert (one != plain).any()
    assert (one != other).any()
    off = dataclasses.replace(CONFIG, dropout=0.0)
    switched_off = vampnet.apply(params, tokens, off, dropout_key=jax.random.key(0))
    np.testing.assert_allclose(switched_off, plain, atol=1e-6)


def test_dropout_under_jit_uses_the_key_it_is_given(params, tokens):
    compiled = jax.jit(lambda key: vampnet.apply(params, tokens, CONFIG, dropout_key=key))
    assert (compiled(jax.random.key(0)) != compiled(jax.random.key(1))).any()


def test_calling_it_again_compiles_nothing(params, tokens):
    vampnet.apply(params, tokens, CONFIG)
    size = vampnet.apply._cache_size()
    vampnet.apply(params, tokens + 1, CONFIG)
    assert vampnet.apply._cache_size() == size > 0


def test_works_under_vmap(params, tokens):
    got = jax.vmap(lambda t: vampnet.apply(params, t[None], CONFIG)[0])(tokens)
    np.testing.assert_allclose(got, vampnet.apply(params, tokens, CONFIG), atol=1e-5)


def test_the_first_codebooks_of_a_codec_with_more_are_used(params):
    codebooks = jax.random.normal(jax.random.key(1), (9, 30, 4))
    np.testing.assert_array_equal(params["embedding"]["codebooks"], codebooks[:5])
    with pytest.raises(ValueError, match="the model needs"):
        vampnet.init(jax.random.key(0), CONFIG, codebooks[:4])


def test_parameters_are_a_plain_dict_of_float32_arrays(params):
    def only_dicts(node):
        return all(map(only_dicts, node.values())) if type(node) is dict else hasattr(node, "dtype")

    assert only_dicts(params)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n_heads": 3}, "not a multiple"),
        ({"n_layers": 0}, "at least 1"),
        ({"n_conditioning_codebooks": 5}, "n_conditioning_codebooks"),
        ({"dropout": 1.0}, "dropout"),
        ({"dtype": "float16"}, "choose one of float32, bfloat16, bfloat16-products"),
        ({"attention": "flash"}, "choose xla or cudnn"),
        ({"attention": "cudnn"}, "set dtype to bfloat16"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(changed, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, **changed)


def test_cudnn_attention_refuses_dropout(params, tokens):
    config = dataclasses.replace(CONFIG, attention="cudnn", dtype="bfloat16")
    with pytest.raises(InputError, match="cuDNN attention has no dropout"):
        vampnet.apply(params, tokens, config, dropout_key=jax.random.key(0))
