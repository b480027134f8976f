"""On several devices the music is the same, and each device has its share of the work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_codecs import random_codec
from small_models import random_model

import vampnet_jax as vampnet
from vampnet_jax import placement
from vampnet_jax.sampling import SamplingOptions

OPTIONS = {"coarse": SamplingOptions(steps=3), "fine": SamplingOptions(steps=2)}
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def model():
    return random_model(random_codec())


def music(model, frames=20, batch=3):
    shape = (batch, model.fine.config.n_codebooks, frames)
    tokens = jax.random.randint(jax.random.key(2), shape, 0, model.codec.codebook_size)
    return tokens, vampnet.masks.periodic(shape, 5)


@pytest.mark.parametrize("sizes", ["data=2", "tensor=2", "fsdp=2"])
def test_vamping_on_two_devices_is_vamping_on_one(model, sizes):
    tokens, mask = music(model)
    divided = placement.divide(model, placement.mesh_of(sizes, model.coarse.config))
    want = vampnet.vamp(model, tokens, mask, KEY, **OPTIONS)
    got = vampnet.vamp(divided, tokens, mask, KEY, **OPTIONS)
    np.testing.assert_array_equal(got, want)


def test_each_device_gets_its_examples_and_its_part_of_the_model(model):
    config = model.coarse.config
    mesh = placement.mesh_of("data=2", config)
    stage = placement.divide_stage(model.coarse, mesh)
    assert placement.batch_shards(stage.params) == 2
    assert placement.batch_shards(model.coarse.params) == 1
    tokens = placement.beside(stage.params, jnp.zeros((4, 2, 10), jnp.int32))
    mask = placement.beside(stage.params, jnp.ones((4, 2, 10), bool))
    assert {shard.data.shape for shard in tokens.addressable_shards} == {(2, 2, 10)}
    made = vampnet.generate(stage.params, tokens, mask, KEY, config, OPTIONS["coarse"])
    assert {shard.data.shape for shard in made.addressable_shards} == {(2, 2, 10)}
    alone = vampnet.generate(
        model.coarse.params, np.zeros((4, 2, 10), np.int32), np.ones((4, 2, 10), bool), KEY, config,
        OPTIONS["coarse"],
    )  # fmt: skip
    np.testing.assert_array_equal(made, alone)

    split = placement.divide_stage(model.coarse, placement.mesh_of("tensor=2", config))
    up = split.params["blocks"]["up"]
    assert {shard.data.size for shard in up.addressable_shards} == {up.size // 2}


def test_batches_that_cannot_be_divided_stay_whole(model):
    mesh = placement.mesh_of("data=2", model.coarse.config)
    stage = placement.divide_stage(model.coarse, mesh)
    odd = jnp.zeros((3, 2))
    assert placement.beside(stage.params, odd) is odd
    assert placement.beside(model.coarse.params, odd) is odd


def test_a_mesh_that_does_not_fit_is_refused(model):
    with pytest.raises(vampnet.InputError, match="needs 4 devices"):
        placement.mesh_of("data=4", model.coarse.config)
    with pytest.raises(vampnet.InputError, match="heads"):
        placement.mesh_of("tensor=3", model.coarse.config)
