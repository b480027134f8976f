"""Prompts keep exactly the tokens that they should."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vampnet_jax import masks

GOLDEN = np.load(Path(__file__).parent / "golden" / "masks.npz")
SHAPE = (1, 14, 50)


def golden(pattern: str) -> list[tuple[str, list[int]]]:
    matches = [(name, re.fullmatch(pattern, name)) for name in GOLDEN.files]
    return [(name, [int(g) for g in match.groups()]) for name, match in matches if match]


@pytest.mark.parametrize(("name", "args"), golden(r"periodic_p(\d+)_w(\d+)"))
def test_periodic_is_the_originals(name, args):
    np.testing.assert_array_equal(masks.periodic(SHAPE, *args), GOLDEN[name].astype(bool))


@pytest.mark.parametrize(("name", "args"), golden(r"inpaint_(\d+)_(\d+)"))
def test_inpaint_is_the_originals(name, args):
    np.testing.assert_array_equal(masks.inpaint(SHAPE, *args), GOLDEN[name].astype(bool))


@pytest.mark.parametrize(("name", "args"), golden(r"codebook_mask_(\d+)"))
def test_upper_codebooks_is_the_originals(name, args):
    got = masks.upper_codebooks(masks.periodic(SHAPE, 7), *args)
    np.testing.assert_array_equal(got, GOLDEN[name].astype(bool))


@pytest.mark.parametrize(("name", "args"), golden(r"codebook_unmask_(\d+)"))
def test_keep_codebooks_is_the_originals(name, args):
    got = masks.keep_codebooks(masks.periodic(SHAPE, 7), *args)
    np.testing.assert_array_equal(got, GOLDEN[name].astype(bool))


@pytest.mark.parametrize(("name", "args"), golden(r"stretch_(\d+)"))
def test_stretch_is_the_originals(name, args):
    (factor,) = args
    short = jnp.zeros((1, 14, -(-50 // factor)), bool)
    _, mask = masks.stretch(short.astype(jnp.int32), short, factor)
    np.testing.assert_array_equal(mask[..., :50], GOLDEN[name].astype(bool))


def test_stretch_repeats_frames_and_keeps_first_copies():
    tokens = jnp.arange(6, dtype=jnp.int32).reshape(1, 2, 3)
    mask = jnp.array([[[False, True, False]] * 2])
    longer, longer_mask = masks.stretch(tokens, mask, 2)
    np.testing.assert_array_equal(longer[0, 0], [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(longer_mask[0, 0], [False, True, True, True, False, True])


@given(
    n_frames=st.integers(1, 60),
    period=st.integers(0, 70),
    width=st.integers(1, 12),
    offset=st.integers(-80, 80),
)
def test_periodic_matches_its_definition(n_frames, period, width, offset):
    kept = np.zeros(n_frames, bool)
    for j in range(0, n_frames, period) if period else ():
        kept[max(0, j - width // 2) : j + width // 2 + 1] = True
    got = masks.periodic((3, n_frames), period, width, offset)
    np.testing.assert_array_equal(got, np.stack([~np.roll(kept, offset)] * 3))


def test_regions_are_half_open_and_may_be_several():
    mask = masks.regions((2, 10), [(0, 2), (5, 6), (9, 40)])
    np.testing.assert_array_equal(np.flatnonzero(mask[1]), [0, 1, 5, 9])
    np.testing.assert_array_equal(
        masks.keep_regions((2, 10), [(0, 2)]), ~masks.regions((2, 10), [(0, 2)])
    )
    assert not masks.regions((2, 10), []).any()


def test_random_and_dropout_hit_their_shares():
    key = jax.random.key(0)
    assert abs(masks.random(key, (4, 4, 5000), 0.3).mean() - 0.3) < 0.01
    frames = masks.dropout(key, jnp.zeros((4, 4, 5000), bool), 0.2)
    assert abs(frames.mean() - 0.2) < 0.01
    np.testing.assert_array_equal(frames, jnp.broadcast_to(frames[:, :1], frames.shape))
    assert masks.dropout(key, jnp.ones((1, 2, 9), bool), 0.0).all()


def test_masks_work_under_jit_and_vmap():
    periods = jnp.array([2, 3])
    got = jax.jit(jax.vmap(lambda p: masks.periodic((4, 30), p)))(periods)
    want = jnp.stack([masks.periodic((4, 30), p) for p in (2, 3)])
    np.testing.assert_array_equal(got, want)
