"""How many tokens a step settles, and which."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vampnet_jax import unmasking


def test_a_plan_is_one_schedule_or_one_for_each_codebook():
    plan = unmasking.plan(4)
    np.testing.assert_array_equal(plan.gamma[:3], unmasking.schedule(4)[:3])
    assert plan.gamma[3] == 0
    np.testing.assert_array_equal(plan.progress, [0.25, 0.5, 0.75, 1])
    by_codebook = unmasking.plan(99, (4, 1, 2))
    np.testing.assert_array_equal(by_codebook.codebook, [0, 0, 0, 0, 1, 2, 2])
    np.testing.assert_array_equal(by_codebook.number, np.arange(7))
    np.testing.assert_array_equal(by_codebook.gamma[:4], plan.gamma)
    assert by_codebook.gamma[4] == by_codebook.gamma[6] == 0
    np.testing.assert_array_equal(by_codebook.elapsed, [0, 0.25, 0.5, 0.75, 0, 0, 0.5])


@pytest.mark.parametrize("steps", [1, 2, 7, 24])
def test_no_step_has_more_to_do_than_was_planned_for(steps):
    total = 60
    plan = unmasking.plan(steps)
    masked, settled = (
        unmasking.most_masked(plan.gamma, total),
        unmasking.most_settled(plan, total),
    )
    tight = 0
    for n0 in range(total + 1):
        still = n0
        for i in range(steps):
            assert still <= masked[i]
            after = int(
                unmasking.n_still_masked(
                    jnp.float32(plan.gamma[i]), jnp.int32(n0), jnp.int32(still)
                )
            )
            after = min(after, still)  # where nothing is masked, nothing can stay so
            assert still - after <= settled
            tight = max(tight, still - after)
            still = after
        assert still == 0
    assert masked[0] == total
    assert settled - tight <= 2


@pytest.mark.parametrize("rounding", [9, 0])
def test_the_least_confident_stay_masked_and_ties_go_frame_by_frame(rounding):
    rng = np.random.default_rng(rounding)
    confidence = rng.normal(size=(6, 40, 3)).round(rounding).astype(np.float32)  # 0: many ties
    confidence[:, 5] = -np.inf
    masked = rng.random((6, 40, 3)) < 0.5
    masked[4] = False
    counts = np.array([0, 1, 17, masked[3].sum(), 0, masked[5].sum() + 3])
    found = unmasking.least_confident(jnp.asarray(confidence), jnp.asarray(masked), counts)
    for chosen, values, here, count in zip(
        np.asarray(found), confidence, masked, counts, strict=True
    ):
        flat = np.where(here, values, np.inf).reshape(-1)
        expected = np.zeros(flat.size, bool)
        expected[np.argsort(flat, kind="stable")[: min(count, here.sum())]] = True
        np.testing.assert_array_equal(chosen.reshape(-1), expected)


def test_any_first_few_of_the_spread_order_are_spread_evenly():
    masked = jnp.ones((1, 250, 1), bool)
    rank = unmasking.spread_ranks(jnp.array([[123456789]], jnp.uint32), masked, False)[0, :, 0]
    assert sorted(rank.tolist()) == list(range(250))
    for n in (5, 20, 77, 200):
        frames = np.flatnonzero(np.asarray(rank) < n)
        gaps = np.diff(np.concatenate([frames, frames[:1] + 250]))
        assert gaps.max() <= 3 * 250 / n + 1  # three-distance theorem; at random far larger
        assert gaps.min() >= 0.3 * 250 / n


def test_the_spread_order_is_of_masked_positions_by_codebook_or_not():
    masked = jax.random.uniform(jax.random.key(0), (2, 30, 3)) < 0.5
    offsets = jax.random.bits(jax.random.key(1), (2, 3))
    together = np.asarray(unmasking.spread_ranks(offsets, masked, False))
    apart = np.asarray(unmasking.spread_ranks(offsets, masked, True))
    for b in range(2):
        chosen = np.asarray(masked[b])
        assert sorted(together[b][chosen]) == list(range(chosen.sum()))
        for c in range(3):
            assert sorted(apart[b, chosen[:, c], c]) == list(range(chosen[:, c].sum()))
    other = unmasking.spread_ranks(offsets + np.uint32(1 << 30), masked, False)
    assert (np.asarray(other) != together).any()


@pytest.mark.parametrize("bound", [0.0, 0.5, 3.0, 1e9])
def test_as_many_tokens_as_the_bound_on_entropy_allows(bound):
    rng = np.random.default_rng(0)
    confidence = rng.normal(size=(4, 10, 3)).astype(np.float32)
    entropy = rng.uniform(0, 2, size=(4, 10, 3)).astype(np.float32)
    masked = rng.uniform(size=(4, 10, 3)) < 0.6
    got = unmasking.n_within_entropy(*map(jnp.asarray, (confidence, entropy, masked)), bound)
    for b in range(4):
        order = np.argsort(-confidence[b][masked[b]])
        h = entropy[b][masked[b]][order]
        fits = [k for k in range(1, len(h) + 1) if h[:k].sum() - h[:k].max() <= bound]
        assert got[b] == max(fits)
