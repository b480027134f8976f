"""Random keys: one for each example of a batch."""

import jax
import jax.numpy as jnp


def example_keys(key: jax.Array, n_examples: int) -> jax.Array:
    """One typed key per example, from one key or from as many keys; legacy keys are taken too."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(n_examples))
    if key.shape != (n_examples,):
        raise ValueError(f"there are {key.shape} keys for {n_examples} examples")
    return key
