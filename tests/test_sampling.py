"""Decoding does what its description says, example by example and step by step."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codec_bridge.errors import InputError
from vampnet_jax import model, sampling, unmasking
from vampnet_jax.config import ModelConfig
from vampnet_jax.sampling import SamplingOptions, generate

COARSE = ModelConfig(n_codebooks=3, n_layers=2, n_heads=2, embedding_dim=32, vocab_size=50)
FINE = dataclasses.replace(COARSE, n_codebooks=5, n_conditioning_codebooks=3)


def make(config: ModelConfig, batch: int = 3, frames: int = 20):
    key = jax.random.key(7)
    shape = (config.n_codebooks, config.vocab_size, config.latent_dim)
    params = model.init(key, config, jax.random.normal(key, shape))
    # An untrained model's logits are nearly flat; steeper ones make the order matter.
    params["head"]["kernel"] = params["head"]["kernel"] * 6
    tokens = jax.random.randint(key, (batch, config.n_codebooks, frames), 0, config.vocab_size)
    mask = jax.random.uniform(jax.random.key(8), tokens.shape) < 0.7
    return params, tokens, mask


logits_of = jax.jit(model.apply, static_argnames="config")


def reference(params, tokens, mask, key, config, options):
    """One example decoded in NumPy, straight from the description; counts per step as well."""
    cc, n_frames = config.n_conditioning_codebooks, tokens.shape[-1]
    tokens, mask = np.array(tokens), np.array(mask)
    mask[:cc] = False
    n0, counts = mask.sum(), []
    for i in range(options.steps):
        current = np.where(mask, config.mask_token, tokens)
        logits = np.asarray(logits_of(params, jnp.asarray(current)[None], config)[0])
        log_p = np.asarray(jax.nn.log_softmax(jnp.asarray(logits) / options.temperature))
        step_key = jax.random.fold_in(key, i)
        shape = (n_frames, config.n_predicted_codebooks)
        u = np.asarray(jax.random.uniform(jax.random.fold_in(step_key, 0), shape)).T
        gumbel = np.asarray(jax.random.gumbel(jax.random.fold_in(step_key, 1), shape)).T
        if i / options.steps >= options.sample_cutoff:
            drawn = log_p.argmax(-1)
        else:
            drawn = np.minimum((np.cumsum(np.exp(log_p), -1) <= u[..., None]).sum(-1), 49)
        r = (i + 1) / options.steps
        confidence = np.take_along_axis(log_p, drawn[..., None], -1)[..., 0]
        confidence = confidence + options.mask_temperature * (1 - r) * gumbel
        tokens[cc:] = np.where(mask[cc:], drawn, tokens[cc:])
        still = mask.sum()
        k = int(np.floor(np.float32(unmasking.schedule(options.steps)[i]) * np.float32(n0)))
        k = max(1, min(k, still - 1)) if i < options.steps - 1 else 0
        confidence = np.where(mask[cc:], confidence, np.inf)
        order = np.argsort(confidence.T.reshape(-1), kind="stable")[: min(k, still)]
        again = np.zeros(order.size and confidence.size, bool)
        again[order] = True
        mask[cc:] = again.reshape(confidence.T.shape).T if again.size else False
        counts.append(int(mask.sum()))
    return tokens, counts


@pytest.mark.parametrize("config", [COARSE, FINE], ids=["coarse", "fine"])
@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(steps=1, typical_mass=None),
        SamplingOptions(steps=6, typical_mass=None, mask_temperature=1.0),
        SamplingOptions(steps=5, typical_mass=None, temperature=0.7, sample_cutoff=0.5),
        SamplingOptions(steps=9, typical_mass=None, sample_cutoff=0.0, mask_temperature=0.0),
    ],
    ids=lambda o: f"{o.steps}-steps",
)
def test_generate_is_the_algorithm_in_numpy(config, options):
    params, tokens, mask = make(config)
    keys = jax.random.split(jax.random.key(3), 3)
    got = generate(params, tokens, mask, keys, config, options)
    for b in range(3):
        want, _ = reference(params, tokens[b], mask[b], keys[b], config, options)
        np.testing.assert_array_equal(got[b], want)


def test_the_number_still_masked_follows_the_schedule(monkeypatch):
    params, tokens, mask = make(COARSE)
    options = SamplingOptions(steps=8, typical_mass=None)
    seen = []
    original = unmasking.least_confident

    def spy(confidence, masked, count):
        again = original(confidence, masked, count)
        jax.debug.callback(lambda n: seen.append(n), jnp.sum(again, axis=(1, 2)), ordered=True)
        return again

    monkeypatch.setattr(unmasking, "least_confident", spy)
    keys = jax.random.split(jax.random.key(0), 3)
    with jax.default_device(jax.devices()[0]):
        jax.block_until_ready(
            sampling.decode(
                params, tokens, mask, keys, jnp.int32(20), COARSE, sampling.traced(options)
            )
        )
    jax.effects_barrier()
    for b in range(3):
        _, counts = reference(params, tokens[b], mask[b], keys[b], COARSE, options)
        assert [int(n[b]) for n in seen] == counts
        assert counts[-1] == 0


def test_kept_tokens_come_out_untouched_and_no_mask_is_left():
    for config in (COARSE, FINE):
        params, tokens, mask = make(config)
        got = generate(params, tokens, mask, jax.random.key(0), config, SamplingOptions(steps=4))
        mask = mask.at[:, : config.n_conditioning_codebooks].set(False)
        np.testing.assert_array_equal(jnp.where(mask, 0, got), jnp.where(mask, 0, tokens))
        assert got.dtype == jnp.int32
        assert got.min() >= 0
        assert got.max() < config.vocab_size


def test_what_stands_at_masked_positions_does_not_matter():
    params, tokens, mask = make(FINE)
    # The conditioning codebooks are read although their mask says otherwise.
    hidden = mask.at[:, :3].set(False)
    options, key = SamplingOptions(steps=3), jax.random.key(0)
    one = generate(params, tokens, mask, key, FINE, options)
    other = generate(params, jnp.where(hidden, 17, tokens), mask, key, FINE, options)
    np.testing.assert_array_equal(one, other)


def test_fully_kept_and_fully_masked_inputs_work():
    params, tokens, mask = make(COARSE)
    key, options = jax.random.key(0), SamplingOptions(steps=5)
    kept = generate(params, tokens, jnp.zeros_like(mask), key, COARSE, options)
    np.testing.assert_array_equal(kept, tokens)
    made = generate(params, tokens, jnp.ones_like(mask), key, COARSE, options)
    assert (made != tokens).mean() > 0.5
    assert made.max() < COARSE.vocab_size


def test_more_steps_than_masked_tokens():
    params, tokens, mask = make(COARSE)
    few = jnp.zeros_like(mask).at[:, 0, :2].set(True)
    got = generate(params, tokens, few, jax.random.key(0), COARSE, SamplingOptions(steps=7))
    np.testing.assert_array_equal(jnp.where(few, 0, got), jnp.where(few, 0, tokens))
    assert got.max() < COARSE.vocab_size


def test_an_example_does_not_depend_on_its_batch_mates():
    params, tokens, mask = make(COARSE, batch=4)
    keys = jax.random.split(jax.random.key(5), 4)
    options = SamplingOptions(steps=6)
    together = generate(params, tokens, mask, keys, COARSE, options)
    for b in range(4):
        one = slice(b, b + 1)
        alone = generate(params, tokens[one], mask[one], keys[one], COARSE, options)
        np.testing.assert_array_equal(alone[0], together[b])
    backwards = generate(params, tokens[::-1], mask[::-1], keys[::-1], COARSE, options)
    np.testing.assert_array_equal(backwards[::-1], together)


def test_sharding_does_not_change_the_result():
    params, tokens, mask = make(COARSE, batch=4)
    options, key = SamplingOptions(steps=6, top_k=20, top_p=0.9), jax.random.key(5)
    want = generate(params, tokens, mask, key, COARSE, options)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.NamedSharding(mesh, jax.P("data"))
    got = generate(
        params, jax.device_put(tokens, split), jax.device_put(mask, split), key, COARSE, options
    )
    assert len(got.sharding.device_set) == 2
    np.testing.assert_array_equal(got, want)


def test_one_key_is_folded_per_example_and_legacy_keys_are_the_same():
    params, tokens, mask = make(COARSE)
    options, key = SamplingOptions(steps=3), jax.random.key(5)
    keys = jnp.stack([jax.random.fold_in(key, b) for b in range(3)])
    one = generate(params, tokens, mask, key, COARSE, options)
    np.testing.assert_array_equal(one, generate(params, tokens, mask, keys, COARSE, options))
    legacy = generate(params, tokens, mask, jax.random.PRNGKey(5), COARSE, options)
    np.testing.assert_array_equal(one, legacy)
    assert (one != generate(params, tokens, mask, jax.random.key(6), COARSE, options)).any()


def test_changing_values_of_options_never_recompiles():
    params, tokens, mask = make(COARSE)
    every = {"top_k": 10, "top_p": 0.9, "steps": 3, "guidance": 0.5}
    generate(params, tokens, mask, jax.random.key(0), COARSE, SamplingOptions(**every))
    size = sampling._generate._cache_size()
    for changed in (
        {"temperature": 2}, {"mask_temperature": 0}, {"sample_cutoff": 0.3}, {"top_k": 3},
        {"top_p": 1}, {"typical_mass": 0.9}, {"typical_min_tokens": 1}, {"guidance": 1},
    ):  # fmt: skip
        options = SamplingOptions(**{**every, **changed})
        generate(params, tokens, mask, jax.random.key(1), COARSE, options)
    assert sampling._generate._cache_size() == size


@pytest.mark.parametrize(
    "changed",
    [
        {"temperature": 3.0}, {"mask_temperature": 0.0}, {"sample_cutoff": 0.0}, {"top_k": 1},
        {"top_p": 0.05}, {"typical_mass": 0.95}, {"typical_min_tokens": 40}, {"steps": 5},
        {"order": "spread"}, {"codebook_steps": (2, 1, 1)}, {"entropy_bound": 9.0},
        {"guidance": 2.0},
    ],
    ids=lambda changed: next(iter(changed)),
)  # fmt: skip
def test_every_option_changes_the_result(changed):
    params, tokens, mask = make(COARSE)
    base = SamplingOptions(steps=4, typical_min_tokens=1, typical_mass=0.5)
    key = jax.random.key(1)
    one = generate(params, tokens, mask, key, COARSE, base)
    other = generate(params, tokens, mask, key, COARSE, dataclasses.replace(base, **changed))
    assert (one != other).any()


def test_works_under_jit_and_vmap():
    params, tokens, mask = make(COARSE)
    options, keys = SamplingOptions(steps=3), jax.random.split(jax.random.key(5), 3)
    want = generate(params, tokens, mask, keys, COARSE, options)

    def one(tokens, mask, key):
        return generate(params, tokens[None], mask[None], key[None], COARSE, options)[0]

    np.testing.assert_array_equal(jax.jit(jax.vmap(one))(tokens, mask, keys), want)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0}, {"temperature": -1}, {"temperature": 0}, {"temperature": float("nan")},
        {"mask_temperature": -0.1}, {"top_k": 0}, {"top_p": -0.5}, {"typical_mass": -1},
        {"sample_cutoff": -1}, {"typical_min_tokens": 0}, {"steps": 2.5}, {"top_k": float("inf")},
        {"order": "left"}, {"codebook_steps": (4, 0)}, {"codebook_steps": 5},
        {"codebook_steps": ()}, {"entropy_bound": -1.0}, {"guidance": -1},
        {"steps": "24"}, {"steps": None}, {"steps": True}, {"temperature": None},
        {"temperature": "0.8"}, {"top_p": np.float32(3)}, {"steps": np.int64(0)},
        {"sample_cutoff": [1.0]}, {"codebook_steps": (4.0, 1)},
        {"entropy_bound": 1.0, "order": "spread"}, {"entropy_bound": 1.0, "codebook_steps": (1, 1)},
    ],
    ids=str,
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        SamplingOptions(**wrong)


def test_numbers_of_numpy_and_arrays_are_options_too():
    options = SamplingOptions(
        steps=np.int64(3), top_p=np.float32(0.5), codebook_steps=(np.int32(2), 1),
        temperature=jnp.float32(0.5),
    )  # fmt: skip
    assert options.total_steps == 3
    assert jax.tree.map(lambda x: x, options) == options


def test_steps_for_all_replace_steps_by_codebook():
    by_codebook = SamplingOptions(codebook_steps=(2, 1, 1), temperature=0.5)
    assert by_codebook.changed(steps=3) == SamplingOptions(steps=3, temperature=0.5)
    assert by_codebook.changed(entropy_bound=1.0).codebook_steps is None
    assert by_codebook.changed(top_k=5, entropy_bound=None).codebook_steps == (2, 1, 1)


def test_shapes_that_do_not_fit_are_refused():
    params, tokens, mask = make(COARSE)
    key, options = jax.random.key(0), SamplingOptions(steps=1)
    with pytest.raises(ValueError, match="model needs"):
        generate(params, tokens[:, :2], mask[:, :2], key, COARSE, options)
    with pytest.raises(ValueError, match="must be alike"):
        generate(params, tokens, mask[:, :, :5], key, COARSE, options)
    with pytest.raises(InputError, match="2 numbers; the model predicts 3 codebooks"):
        generate(params, tokens, mask, key, COARSE, SamplingOptions(codebook_steps=(1, 1)))
    with pytest.raises(ValueError, match="keys for 3 examples"):
        generate(params, tokens, mask, jax.random.split(key, 2), COARSE, options)


@pytest.mark.parametrize("config", [COARSE, FINE], ids=["coarse", "fine"])
def test_padding_changes_nothing(config):
    params, tokens, mask = make(config, frames=20)
    options, key = SamplingOptions(steps=5, mask_temperature=2.0), jax.random.key(0)
    want = generate(params, tokens, mask, key, config, options)
    noise = jax.random.randint(key, (*tokens.shape[:2], 7), 0, config.vocab_size)
    padded = jnp.concatenate([tokens, noise], axis=-1)
    masked = jnp.concatenate([mask, noise > 20], axis=-1)
    got = generate(params, padded, masked, key, config, options, n_frames=20)
    np.testing.assert_array_equal(got[..., :20], want)
    np.testing.assert_array_equal(got[..., 20:], noise)


FASTER = [
    SamplingOptions(steps=5, order="spread"),
    SamplingOptions(codebook_steps=(3, 2, 1), mask_temperature=1.0),
    SamplingOptions(codebook_steps=(3, 2, 1), order="spread"),
    SamplingOptions(steps=30, entropy_bound=20.0, mask_temperature=0.5),
    SamplingOptions(steps=3, guidance=1.5),
]
NAMES = ["spread", "by codebook", "by codebook, spread", "entropy bound", "guidance"]


@pytest.mark.parametrize("options", FASTER, ids=NAMES)
def test_faster_ways_keep_what_is_kept_and_treat_every_example_alone(options):
    params, tokens, mask = make(COARSE)
    keys = jax.random.split(jax.random.key(5), 3)
    got = generate(params, tokens, mask, keys, COARSE, options)
    np.testing.assert_array_equal(jnp.where(mask, 0, got), jnp.where(mask, 0, tokens))
    assert 0 <= got.min() <= got.max() < COARSE.vocab_size
    assert (got != tokens)[mask].mean() > 0.5
    for b in range(3):
        one = slice(b, b + 1)
        alone = generate(params, tokens[one], mask[one], keys[one], COARSE, options)
        np.testing.assert_array_equal(alone[0], got[b])
    padded = [jnp.pad(x, ((0, 0), (0, 0), (0, 6)), constant_values=1) for x in (tokens, mask)]
    longer = generate(params, *padded, keys, COARSE, options, n_frames=20)
    np.testing.assert_array_equal(longer[..., :20], got)
    nothing = generate(params, tokens, jnp.zeros_like(mask), keys, COARSE, options)
    np.testing.assert_array_equal(nothing, tokens)


def settled_by_step(monkeypatch, options: SamplingOptions, mask: jax.Array) -> list[np.ndarray]:
    """What each step of a run over COARSE settles, bool [B, T, C]."""
    params, tokens, _ = make(COARSE)
    seen = []
    original = model.frame_features

    def spy(params, tokens, config, **options):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), tokens, ordered=True)
        return original(params, tokens, config, **options)

    monkeypatch.setattr(model, "frame_features", spy)
    keys = jax.random.split(jax.random.key(0), 3)
    arguments = (params, tokens, mask, keys, jnp.int32(20), COARSE, sampling.traced(options))
    jax.block_until_ready(sampling.decode(*arguments))
    jax.effects_barrier()
    masked = [np.swapaxes(x == COARSE.mask_token, 1, 2) for x in seen]
    masked.append(np.zeros_like(masked[0]))
    return [before & ~after for before, after in itertools.pairwise(masked)]


def test_spread_settles_frames_far_from_each_other(monkeypatch):
    everything = jnp.ones((3, 3, 20), bool)
    steps = settled_by_step(monkeypatch, SamplingOptions(steps=10, order="spread"), everything)
    first = np.any(steps[:4], axis=0)  # 12 of 60 tokens
    counts = [int(step[0].sum()) for step in steps]
    gamma = unmasking.schedule(10)
    still = [60, *(int(np.floor(np.float32(60) * g)) for g in gamma[:-1]), 0]
    assert counts == [a - b for a, b in itertools.pairwise(still)]
    for example in first:
        for codebook in example.T:
            assert (np.diff(np.flatnonzero(codebook)) > 1).all()


def test_codebooks_are_settled_one_after_the_other(monkeypatch):
    everything = jnp.ones((3, 3, 20), bool)
    steps = settled_by_step(monkeypatch, SamplingOptions(codebook_steps=(3, 1, 2)), everything)
    codebooks = [np.flatnonzero(step.any((0, 1))).tolist() for step in steps]
    assert codebooks == [[0], [0], [0], [1], [2], [2]]
    assert [int(step[0].sum()) for step in steps[3:]] == [20, 6, 14]


def test_a_bound_on_entropy_ends_early_and_is_never_slower_than_the_schedule(monkeypatch):
    _, _, mask = make(COARSE)
    at_once = settled_by_step(monkeypatch, SamplingOptions(steps=9, entropy_bound=1e9), mask)
    assert len(at_once) == 1
    plain = settled_by_step(monkeypatch, SamplingOptions(steps=9), mask)
    tight = settled_by_step(monkeypatch, SamplingOptions(steps=9, entropy_bound=0.0), mask)
    assert [step[0].sum() for step in tight] == [step[0].sum() for step in plain]
    some = settled_by_step(monkeypatch, SamplingOptions(steps=30, entropy_bound=30.0), mask)
    assert 1 < len(some) < 30


def test_codebook_by_codebook_the_likeliest_token_of_each(monkeypatch):
    params, tokens, mask = make(FINE)
    options = SamplingOptions(codebook_steps=(1, 1), sample_cutoff=0.0, typical_mass=None)
    got = generate(params, tokens, mask, jax.random.key(0), FINE, options)
    want, left = tokens, mask.at[:, :3].set(False)
    for c in (3, 4):
        logits = model.apply(params, jnp.where(left, FINE.mask_token, want), FINE)
        likeliest = jnp.argmax(logits[:, c - 3], axis=-1)
        want = want.at[:, c].set(jnp.where(left[:, c], likeliest, want[:, c]))
        left = left.at[:, c].set(False)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("config", [COARSE, FINE], ids=["coarse", "fine"])
def test_guidance_pushes_away_from_the_input_without_a_prompt(config):
    params, tokens, mask = make(config)
    mask = mask.at[:, : config.n_conditioning_codebooks].set(False)
    likeliest = SamplingOptions(steps=1, sample_cutoff=0.0, typical_mass=None)

    def guided(amount: float | None) -> jax.Array:
        options = dataclasses.replace(likeliest, guidance=amount)
        return generate(params, tokens, mask, jax.random.key(0), config, options)

    given = jnp.arange(config.n_codebooks)[:, None] < config.n_conditioning_codebooks
    prompted = model.apply(params, jnp.where(mask, config.mask_token, tokens), config)
    empty = model.apply(params, jnp.where(given[None], tokens, config.mask_token), config)
    first = config.n_conditioning_codebooks
    want = jnp.argmax(prompted + 2 * (prompted - empty), axis=-1)
    want = jnp.where(mask[:, first:], want, tokens[:, first:])
    np.testing.assert_array_equal(guided(2.0)[:, first:], want)
    np.testing.assert_array_equal(guided(0.0), guided(None))


def test_how_the_steps_are_divided_into_programs_changes_nothing():
    params, tokens, mask = make(FINE)
    keys = jax.random.split(jax.random.key(0), 3)
    results = []
    options = sampling.traced(SamplingOptions(steps=6, mask_temperature=1.0))
    run = jax.jit(sampling.decode, static_argnums=(5, 7))
    for segments in (1, 2, 6):
        results.append(run(params, tokens, mask, keys, jnp.int32(20), FINE, options, segments))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
