"""Products of activations with weights, both rounded to bfloat16: fast on CPUs.

CPUs with instructions for bfloat16 (AMX, AVX512-BF16) multiply it faster than float32,
but XLA uses them only for products whose result is float32 and whose operands lie in memory in the
order that its kernels read. `jnp.einsum` has gradients without either, so they are written here.
On several devices that order would make XLA gather whole batches; `sharding.plan` refuses it.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint


def product(letters: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """`jnp.einsum(letters, x, w)` of numbers rounded to bfloat16, summed in float32.

    So are its gradients. There is no forward-mode differentiation.

    Args:
      letters: the last ones of x are the first of w, and the result has the others in order, such
        as "BTHK,HKD->BTD".
      x, w: float32.

    Returns:
      float32.
    """
    operands, result = letters.split("->")
    of_x, of_w = operands.split(",")
    shared = (len(of_x) + len(of_w) - len(result)) // 2
    if of_x[-shared:] != of_w[:shared] or result != of_x[:-shared] + of_w[shared:]:
        raise ValueError(f"{letters} is no matrix product of neighbouring letters")
    rows = math.prod(w.shape[:shared])
    out = _matrix_product(x.reshape(-1, rows), w.reshape(rows, -1))
    return out.reshape(*x.shape[:-shared], *w.shape[shared:])


@jax.custom_vjp
def _matrix_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """`[M, K]`, `[K, N]` → `[M, N]`."""
    return _forward(x, w)[0]


def _forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    return _float32_sums(x, w, 1, 0), (x, w)


def _backward(
    rounded: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, w = rounded
    gradient = gradient.astype(jnp.bfloat16)
    of_w = _float32_sums(_in_row_order(x.T), _in_row_order(gradient), 1, 0)
    return _float32_sums(gradient, w, 1, 1), of_w


_matrix_product.defvjp(_forward, _backward)


def _float32_sums(a: jax.Array, b: jax.Array, axis_of_a: int, axis_of_b: int) -> jax.Array:
    axes = (((axis_of_a,), (axis_of_b,)), ((), ()))
    return lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def _in_row_order(x: jax.Array) -> jax.Array:
    """On CPUs have a matrix really transposed, where XLA would only read it in another order."""

    def transposed(x: jax.Array) -> jax.Array:
        return with_layout_constraint(x, Layout((0, 1)))

    return lax.platform_dependent(x, cpu=transposed, default=lambda x: x)
