"""Filters keep exactly the tokens that sorting would keep."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vampnet_jax import filters
from vampnet_jax.drawing import inverse_cdf
from vampnet_jax.unmasking import schedule

GOLDEN = np.load(Path(__file__).parent / "golden" / "filters.npz")
LOGITS = jnp.asarray(GOLDEN["logits"])


# Compiled once each, since thresholds are traced and the shapes below few.
typical_keep = jax.jit(lambda x, mass, n: filters.typical_keep(x, jnp.float32(mass), n))
top_p_keep = jax.jit(lambda x, p: filters.top_p_keep(x, jnp.float32(p)))
top_k_keep = jax.jit(filters.top_k_keep)
draw = jax.jit(lambda p, u: inverse_cdf(p, jnp.float32(u)))


def golden(pattern: str) -> list[tuple[str, list]]:
    matches = [(name, re.fullmatch(pattern, name)) for name in GOLDEN.files]
    return [
        (name, [float(g) if "." in g else int(g) for g in match.groups()])
        for name, match in matches
        if match
    ]


@pytest.mark.parametrize(("name", "args"), golden(r"typical_keep_m([\d.]+)_n(\d+)"))
def test_typical_keeps_what_the_original_keeps(name, args):
    np.testing.assert_array_equal(typical_keep(LOGITS, *args), GOLDEN[name])


@pytest.mark.parametrize(("name", "args"), golden(r"top_p_keep_([\d.]+)"))
def test_top_p_keeps_what_the_original_keeps(name, args):
    np.testing.assert_array_equal(top_p_keep(LOGITS, *args), GOLDEN[name])


@pytest.mark.parametrize(("name", "args"), golden(r"top_k_keep_(\d+)"))
def test_top_k_keeps_what_the_original_keeps(name, args):
    np.testing.assert_array_equal(top_k_keep(LOGITS, *args), GOLDEN[name])


@pytest.mark.parametrize(("name", "args"), golden(r"gamma_(\d+)_steps"))
def test_schedule_is_the_originals_to_the_last_bit(name, args):
    np.testing.assert_array_equal(schedule(args[0]), GOLDEN[name])


SIZE = 33
# Few distinct values, so that ties are common; whole numbers, so that sums do not round.
tied = hnp.arrays(np.float32, SIZE, elements=st.integers(-6, 6).map(float))
spread = hnp.arrays(np.float32, SIZE, elements=st.floats(-8, 8, width=32), unique=True)


@given(logits=tied, k=st.integers(1, 50))
def test_top_k_matches_sorting(logits, k):
    kth = np.sort(logits)[::-1][min(k, len(logits)) - 1]
    np.testing.assert_array_equal(top_k_keep(jnp.asarray(logits), k), logits >= kth)


@given(logits=spread, p=st.floats(0, 1.125, width=32))
def test_top_p_matches_sorting(logits, p):
    probabilities = np.asarray(jax.nn.softmax(jnp.asarray(logits)), np.float64)
    order = np.argsort(-logits, kind="stable")
    preceding = np.cumsum(probabilities[order]) - probabilities[order]
    if np.any(np.abs(preceding - p) < 1e-5):
        return  # rounding decides
    keep = np.empty(len(logits), bool)
    keep[order] = preceding <= p
    np.testing.assert_array_equal(top_p_keep(jnp.asarray(logits), p), keep)


@given(logits=spread, mass=st.floats(0, 1.25, width=32), min_tokens=st.integers(1, 50))
def test_typical_matches_sorting(logits, mass, min_tokens):
    log_p = np.asarray(jax.nn.log_softmax(jnp.asarray(logits)), np.float64)
    p = np.exp(log_p)
    distance = np.abs(-log_p + np.sum(p * log_p))
    order = np.argsort(distance, kind="stable")
    held = np.cumsum(p[order])
    gaps = np.diff(np.sort(distance))
    if np.any(gaps < 1e-5) or np.any(np.abs(held[:-1] - mass) < 1e-5):
        return  # rounding decides
    count = max(int(np.sum(held < mass)) + 1, min_tokens) if mass < 1 else len(p)
    keep = np.zeros(len(logits), bool)
    keep[order[:count]] = True
    got = typical_keep(jnp.asarray(logits), mass, min_tokens)
    np.testing.assert_array_equal(got, keep)


def test_filters_apply_in_order_and_each_sees_what_the_last_one_left():
    logits = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1]))
    kept = filters.filter_logits(logits, top_k=2, top_p=0.5)
    # After top-k the first token holds 4/7 > 0.5, so top-p drops the second.
    np.testing.assert_array_equal(jnp.isfinite(kept), [True, False, False, False])
    np.testing.assert_array_equal(filters.filter_logits(logits), logits)


def test_equal_tokens_are_treated_alike():
    logits = jnp.zeros((3, 10))
    assert typical_keep(logits, 0.1, 1).all()
    assert top_p_keep(logits, 0.1).all()
    assert top_k_keep(logits, 1).all()


def test_thresholds_are_traced():
    before = typical_keep._cache_size()
    typical_keep(jnp.zeros((2, 7)), 0.1, 1)
    typical_keep(jnp.zeros((2, 7)), 0.9, 3)
    assert typical_keep._cache_size() == before + 1


@given(logits=tied, u=st.floats(0, 1, width=32, exclude_max=True))
def test_inverse_cdf_takes_the_first_token_above_u(logits, u):
    p = np.array(jax.nn.softmax(jnp.asarray(logits)))
    p[logits == logits.min()] = 0 if logits.min() < logits.max() else p[0]
    got = int(draw(jnp.asarray(p), u))
    cdf = np.cumsum(p.astype(np.float64)) / p.sum(dtype=np.float64)
    assert p[got] > 0
    assert cdf[got] > u - 1e-5
    assert got == 0 or cdf[got - 1] <= u + 1e-5


def test_inverse_cdf_never_draws_what_has_no_probability():
    u = jnp.asarray([0.0, 1e-7, 0.5, 1 - 2.0**-23, 1 - 2.0**-24], jnp.float32)
    for alive in ([0], [31], [32], [70], [3, 64], list(range(40, 60))):
        p = jnp.zeros(71).at[jnp.array(alive)].set(1 / 3)
        assert set(np.asarray(inverse_cdf(jnp.tile(p, (5, 1)), u))) <= set(alive)


def test_draws_follow_the_distribution():
    p = jax.nn.softmax(jax.random.normal(jax.random.key(1), (100,)))
    u = jax.random.uniform(jax.random.key(2), (200_000,))
    counts = np.bincount(inverse_cdf(jnp.broadcast_to(p, (200_000, 100)), u), minlength=100)
    expected = np.asarray(p) * 200_000
    chi_square = np.sum((counts - expected) ** 2 / expected)
    assert chi_square < 148.2  # 99.9th percentile at 99 degrees of freedom
