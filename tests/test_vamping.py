"""Vamping covers sequences of any length, window by window, and changes only what it may."""

import dataclasses
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import vampnet_jax as vampnet
from vampnet_jax import model, vamping
from vampnet_jax.sampling import SamplingOptions

COARSE = vampnet.ModelConfig(
    n_codebooks=2, n_layers=1, n_heads=2, embedding_dim=16, vocab_size=20, latent_dim=4
)
FINE = dataclasses.replace(COARSE, n_codebooks=4, n_conditioning_codebooks=2)
OPTIONS = {"coarse": SamplingOptions(steps=3), "fine": SamplingOptions(steps=2)}


@pytest.fixture(scope="module")
def small():
    codebooks = jax.random.normal(jax.random.key(0), (4, 20, 4))
    stages = {
        name: vampnet.Stage(model.init(jax.random.key(1), config, codebooks), config)
        for name, config in (("coarse", COARSE), ("fine", FINE))
    }
    return types.SimpleNamespace(**stages, coarse_window=16, fine_window=8)


def music(frames: int, batch: int = 2) -> jax.Array:
    return jax.random.randint(jax.random.key(2), (batch, 4, frames), 0, 20)


@given(n_frames=st.integers(1, 400), window=st.integers(1, 50))
def test_windows_cover_everything_and_share_a_quarter(n_frames, window):
    starts = vamping.window_starts(n_frames, window)
    covered = np.zeros(n_frames, bool)
    for start in starts:
        assert 0 <= start <= max(0, n_frames - window)
        covered[start : start + window] = True
    assert covered.all()
    assert all(a < b <= a + window - window // 4 for a, b in itertools.pairwise(starts))


@given(n_frames=st.integers(1, 400), window=st.integers(1, 50))
def test_windows_of_one_pass_do_not_overlap(n_frames, window):
    starts = vamping.window_starts(n_frames, window)
    passes = vamping.independent(starts, window)
    assert sorted(s for members in passes for s in members) == starts
    assert len(passes) <= 3
    for members in passes:
        assert all(b - a >= window for a, b in itertools.pairwise(members))


@pytest.mark.parametrize("frames", [5, 16, 17, 45])
def test_kept_tokens_stay_and_the_rest_is_generated(small, frames):
    tokens = music(frames)
    mask = vampnet.masks.periodic(tokens.shape, 5)
    hidden = jnp.where(mask, -1, tokens)  # what stands there must not matter
    got = vampnet.vamp(small, hidden, mask, jax.random.key(0), **OPTIONS)
    np.testing.assert_array_equal(jnp.where(mask, 0, got), jnp.where(mask, 0, tokens))
    assert got.shape == tokens.shape
    assert got.min() >= 0
    assert got.max() < 20


def test_each_window_sees_what_the_one_before_has_generated(small, monkeypatch):
    seen = []
    original = vamping.generate

    def spy(params, tokens, mask, keys, config, options, **rest):
        made = original(params, tokens, mask, keys, config, options, **rest)
        seen.append((config, np.asarray(tokens), np.asarray(mask), np.asarray(made)))
        return made

    monkeypatch.setattr(vamping, "generate", spy)
    monkeypatch.setattr(vamping, "rows_at_once", lambda params: vamping.MAX_ROWS)
    tokens = music(40, batch=1)
    vampnet.vamp(small, tokens, jnp.ones(tokens.shape, bool), jax.random.key(0), **OPTIONS)
    coarse = [call for call in seen if call[0] == COARSE]
    assert len(coarse) == 3
    (_, _, first_mask, first), (_, second, second_mask, _) = coarse[:2]
    assert first_mask.all()
    np.testing.assert_array_equal(second[0, :, :4], first[0, :, 12:])
    assert not second_mask[0, :, :4].any()
    assert second_mask[0, :, 4:].all()
    fine_batches = [len(call[1]) for call in seen if call[0] == FINE]
    assert len(fine_batches) < len(vamping.window_starts(40, 8))  # independent ones ran together
    assert fine_batches[0] > 1


def test_an_example_is_the_same_alone_and_in_a_batch(small):
    tokens = music(37, batch=3)
    mask = vampnet.masks.periodic(tokens.shape, 4)
    keys = jax.random.split(jax.random.key(0), 3)
    together = vampnet.vamp(small, tokens, mask, keys, **OPTIONS)
    for b in range(3):
        one = slice(b, b + 1)
        alone = vampnet.vamp(small, tokens[one], mask[one], keys[one], **OPTIONS)
        np.testing.assert_array_equal(alone[0], together[b])


def test_how_many_windows_run_at_once_does_not_matter(small, monkeypatch):
    tokens = music(60, batch=3)
    mask = jnp.ones(tokens.shape, bool)
    want = vampnet.vamp(small, tokens, mask, jax.random.key(0), **OPTIONS)
    rows = []
    original = vamping.generate

    def spy(params, tokens, *rest, **named):
        rows.append(len(tokens))
        return original(params, tokens, *rest, **named)

    monkeypatch.setattr(vamping, "rows_at_once", lambda params: 2)
    monkeypatch.setattr(vamping, "generate", spy)
    got = vampnet.vamp(small, tokens, mask, jax.random.key(0), **OPTIONS)
    assert max(rows) == 2
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("cores", "rows"), [(1, 1), (2, 1), (5, 2), (12, 4), (200, 16)])
def test_a_cpu_decodes_as_many_windows_at_once_as_its_cores_can_hold(
    small, monkeypatch, cores, rows
):
    monkeypatch.setattr(vamping, "_cores", lambda: cores)
    assert vamping.rows_at_once(small.fine.params) == rows


def test_windows_do_not_repeat_their_noise(small):
    tokens = jnp.zeros((1, 4, 48), jnp.int32)
    got = vampnet.vamp(small, tokens, jnp.ones(tokens.shape, bool), jax.random.key(0), **OPTIONS)
    assert (got[..., :12] != got[..., 12:24]).any()
    assert (got[..., :12] != got[..., 24:36]).any()


def test_lengths_share_programs(small):
    from vampnet_jax.sampling import _generate

    def run(frames):
        tokens = music(frames, batch=1)
        vampnet.vamp(small, tokens, jnp.ones(tokens.shape, bool), jax.random.key(0), **OPTIONS)

    run(61)
    before = _generate._cache_size()
    run(67)
    assert _generate._cache_size() == before
    run(7)
    before = _generate._cache_size()
    run(8)  # shorter than a coarse window, but padded to the same eighth of it
    assert _generate._cache_size() == before


@given(length=st.integers(1, 600), window=st.integers(8, 600))
def test_buckets_are_few_and_hold_their_clip(length, window):
    length = min(length, window)
    padded = vamping.bucket(length, window)
    assert length <= padded <= window
    assert padded - length <= window / 8 + 1
    assert len({vamping.bucket(n, window) for n in range(1, window + 1)}) <= 8


def test_progress_counts_every_window_of_a_stage_once(small):
    calls = []
    tokens = music(50)
    vampnet.vamp(
        small, tokens, jnp.ones(tokens.shape, bool), jax.random.key(0), **OPTIONS,
        on_progress=lambda *call: calls.append(call),
    )  # fmt: skip
    stages = [stage for stage, _, _ in calls]
    assert stages == sorted(stages)  # coarse before fine
    for stage, window in (("coarse", 16), ("fine", 8)):
        counts = [(done, total) for name, done, total in calls if name == stage]
        n = len(vamping.window_starts(50, window))
        assert {total for _, total in counts} == {n}
        done = [done for done, _ in counts]
        assert done == sorted(done)
        assert done[-1] == n


def test_shapes_that_do_not_fit_are_refused(small):
    tokens = music(8)
    with pytest.raises(ValueError, match="the model needs"):
        vampnet.vamp(small, tokens[:, :3], tokens[:, :3] > 0, jax.random.key(0))
    with pytest.raises(ValueError, match="must be alike"):
        vampnet.vamp(small, tokens, tokens[:1] > 0, jax.random.key(0))
