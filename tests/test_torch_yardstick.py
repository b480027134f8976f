"""A second implementation, in plain PyTorch, agrees with the model and the sampler."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import vampnet_jax as vampnet
from benchmarks import torch_vampnet

COARSE = vampnet.ModelConfig(
    n_codebooks=3, n_layers=2, n_heads=4, embedding_dim=32, vocab_size=50, latent_dim=4
)
FINE = dataclasses.replace(COARSE, n_codebooks=5, n_conditioning_codebooks=3)


@pytest.fixture(scope="module", params=[COARSE, FINE], ids=["coarse", "fine"])
def pair(request):
    config = request.param
    codebooks = jax.random.normal(jax.random.key(1), (5, 50, 4))
    params = vampnet.init(jax.random.key(2), config, codebooks)
    # As drawn it is nearly 0, and would hide a wrong bucket.
    params["position_bias"] = jax.random.normal(jax.random.key(3), params["position_bias"].shape)
    return config, params, torch_vampnet.from_params(params, config)


def music(config, batch=2, frames=300):
    tokens = jax.random.randint(jax.random.key(4), (batch, config.n_codebooks, frames), 0, 50)
    mask = jax.random.bernoulli(jax.random.key(5), 0.7, tokens.shape)
    return tokens, mask.at[:, : config.n_conditioning_codebooks].set(False)


def to_torch(array):
    array = np.array(array)
    return torch.from_numpy(array.astype(np.int64) if array.dtype != bool else array)


def test_logits_agree(pair):
    config, params, model = pair
    tokens, mask = music(config)
    tokens = jnp.where(mask, config.mask_token, tokens)
    ours = np.swapaxes(np.asarray(vampnet.apply(params, tokens, config)), 1, 2)
    theirs = model(to_torch(tokens), model.position_bias(tokens.shape[-1])).numpy()
    assert np.abs(ours - theirs).max() < 2e-6 * np.abs(theirs).max()


@pytest.mark.parametrize("steps", [1, 5])
def test_the_likeliest_tokens_agree(pair, steps):
    config, params, model = pair
    options = vampnet.SamplingOptions(
        steps=steps, sample_cutoff=0.0, mask_temperature=0.0, typical_mass=None
    )
    tokens, mask = music(config, frames=40)
    ours = vampnet.generate(params, tokens, mask, jax.random.key(0), config, options)
    sampler = torch_vampnet.Sampler(model, options)
    theirs = sampler(to_torch(tokens), to_torch(mask), torch.Generator())
    assert (np.asarray(ours) == theirs.numpy()).mean() > 0.99


@pytest.mark.parametrize(
    "filters",
    [
        {"typical_mass": 0.15, "typical_min_tokens": 5},
        {"typical_mass": 0.6, "typical_min_tokens": 1},
        {"typical_mass": None, "top_k": 7},
        {"typical_mass": None, "top_p": 0.4},
        {"typical_mass": 0.7, "typical_min_tokens": 3, "top_k": 9, "top_p": 0.5},
    ],
)
def test_filters_agree(filters):
    logits = jax.random.normal(jax.random.key(0), (200, 50)) * 2
    options = vampnet.SamplingOptions(**filters)
    names = ("typical_mass", "typical_min_tokens", "top_k", "top_p")
    from vampnet_jax.filters import filter_logits

    ours = filter_logits(logits, **{name: getattr(options, name) for name in names})
    theirs = torch_vampnet.filter_logits(torch.from_numpy(np.array(logits)), options)
    np.testing.assert_array_equal(np.isinf(np.asarray(ours)), np.isinf(theirs.numpy()))


def test_tokens_are_drawn_from_the_same_distribution(pair):
    """One step, many examples alike: how often each token is drawn agrees."""
    config, params, model = pair
    options = vampnet.SamplingOptions(steps=1, typical_mass=0.5, typical_min_tokens=5)
    tokens, mask = music(config, batch=1, frames=2)
    batch = 3000
    tokens, mask = (jnp.repeat(x, batch, axis=0) for x in (tokens, mask))
    mask = jnp.ones_like(mask).at[:, : config.n_conditioning_codebooks].set(False)
    ours = vampnet.generate(params, tokens, mask, jax.random.key(0), config, options)
    sampler = torch_vampnet.Sampler(model, options)
    generator = torch.Generator().manual_seed(0)
    theirs = sampler(to_torch(tokens), to_torch(mask), generator).numpy()
    for c in range(config.n_conditioning_codebooks, config.n_codebooks):
        a, b = (np.bincount(np.asarray(x)[:, c, 0], minlength=50) / batch for x in (ours, theirs))
        assert np.abs(a - b).sum() / 2 < 0.06  # total variation; about 0.03 by chance
