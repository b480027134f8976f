"""Products of numbers rounded to bfloat16 are those of the rounded numbers, gradients as well."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vampnet_jax.products import product

LETTERS = ["BTD,DHK->BTHK", "BTHK,HKD->BTD", "BTD,DgF->BTgF", "BTF,FD->BTD", "BTD,DpV->BTpV"]
SIZES = {"B": 2, "T": 5, "D": 12, "H": 3, "K": 4, "F": 8, "g": 2, "p": 3, "V": 7}


def operands(letters):
    names = letters.split("->")[0].split(",")
    shapes = [[SIZES[letter] for letter in name] for name in names]
    return [jax.random.normal(jax.random.key(n), shape) for n, shape in enumerate(shapes)]


def rounded(x):
    return np.asarray(x.astype(jnp.bfloat16).astype(jnp.float32))


@pytest.mark.parametrize("letters", LETTERS)
def test_sums_are_those_of_rounded_numbers_in_float32(letters):
    x, w = operands(letters)
    found = jax.jit(product, static_argnums=0)(letters, x, w)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, np.einsum(letters, rounded(x), rounded(w)), atol=1e-5)
    assert np.abs(found - np.einsum(letters, x, w)).max() > 1e-3


@pytest.mark.parametrize("letters", LETTERS)
def test_gradients_are_those_of_the_rounded_product(letters):
    x, w = operands(letters)
    of_x, of_w = letters.split("->")[0].split(",")
    result = letters.split("->")[1]
    out, pull = jax.vjp(lambda x, w: product(letters, x, w), x, w)
    gradient = jax.random.normal(jax.random.key(2), out.shape)
    to_x, to_w = jax.jit(pull)(gradient)
    assert to_x.dtype == to_w.dtype == jnp.float32
    wanted = np.einsum(f"{result},{of_w}->{of_x}", rounded(gradient), rounded(w))
    np.testing.assert_allclose(to_x, wanted, atol=1e-5)
    wanted = np.einsum(f"{of_x},{result}->{of_w}", rounded(x), rounded(gradient))
    np.testing.assert_allclose(to_w, wanted, atol=1e-5)


def test_works_under_vmap():
    x, w = operands("BTF,FD->BTD")

    def gradient(row):
        return jax.grad(lambda w: jnp.sum(product("TF,FD->TD", row, w) ** 2))(w)

    each = jax.jit(jax.vmap(gradient))(x)
    alone = jnp.stack([gradient(row) for row in x])
    np.testing.assert_allclose(each, alone, rtol=1e-5)


def test_on_a_cpu_operands_of_the_weights_gradient_are_laid_out_for_its_kernel():
    x, w = operands("BTF,FD->BTD")
    loss = jax.jit(jax.grad(lambda w: jnp.sum(product("BTF,FD->BTD", x, w))))
    lowered = loss.trace(w).lower(lowering_platforms=("cpu",)).as_text()
    assert lowered.count("LayoutConstraint") == 2
    elsewhere = loss.trace(w).lower(lowering_platforms=("tpu",)).as_text()
    assert "LayoutConstraint" not in elsewhere


@pytest.mark.parametrize("letters", ["BTD,HD->BTH", "BTD,DH->BHT", "BTD,BTD->BTD"])
def test_other_einsums_are_refused(letters):
    with pytest.raises(ValueError, match="no matrix product"):
        product(letters, jnp.ones((2, 3, 4)), jnp.ones((4, 4)))
