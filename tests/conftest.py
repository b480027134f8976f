"""Strict settings for every test: what is wrong must fail, not be papered over."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Compilation makes first examples slow, and CI must see the same examples every time.
hypothesis.settings.register_profile("vampnet", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("vampnet")
