"""Sampling on many devices: where the parameters lie decides where everything is computed.

A mesh has three axes, as in training: `data` and `fsdp` divide the batch, `tensor` divides heads,
hidden units and codes of models too large for one device (`fsdp` divides the parameters as
well, and gathers them when they are used). `generate` and `vamp` give each device its examples.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vampnet_jax.config import ModelConfig
from vampnet_jax.release import Model, Stage
from vampnet_jax.training.sharding import AXES, BATCH, Layout, plan


def mesh_of(sizes: str, config: ModelConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of devices for sampling.

    Args:
      sizes: of the axes, such as "data=4,tensor=2"; fsdp is 1 and data takes the other devices
        unless given.
      config: a model that must be divisible by them.
      devices: which to use; None: all.

    Raises:
      InputError: sizes that do not fit the devices or the model.
    """
    sizes += "".join(f",{axis}=1" for axis in ("fsdp", "tensor") if axis not in sizes)
    # No batch to divide yet: `vamp` fills one up to a multiple.
    return plan(config, 0, sizes, devices=devices).mesh


def divide(model: Model, mesh: Mesh) -> Model:
    """The same model with its parameters divided over the mesh, or copied to each of its devices.

    `vamp`, `stream` and everything that uses them then compute on all its devices.
    """
    return dataclasses.replace(
        model, coarse=divide_stage(model.coarse, mesh), fine=divide_stage(model.fine, mesh)
    )


def divide_stage(stage: Stage, mesh: Mesh) -> Stage:
    """One of the two transformers alone."""
    return stage._replace(params=jax.device_put(stage.params, Layout(mesh).shardings(stage.params)))


def batch_shards(params: Any) -> int:
    """Into how many parts the batch of a model with these parameters is divided."""
    mesh = _mesh(params)
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH)


def beside(params: Any, array: jax.Array) -> jax.Array:
    """An array `[B, …]` placed where parameters want it: each device gets its examples.

    Left as it is if the parameters are on one device, or if B cannot be divided evenly.
    """
    mesh = _mesh(params)
    if mesh is None or len(array) % batch_shards(params):
        return array
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(BATCH)))


def _mesh(params: Any) -> Mesh | None:
    """The mesh that parameters lie on; None inside jit, where that is not known."""
    for leaf in jax.tree.leaves(params):
        if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array):
            return None
        sharding = leaf.sharding
        if isinstance(sharding, NamedSharding) and set(AXES) <= set(sharding.mesh.axis_names):
            return sharding.mesh if isinstance(sharding.mesh, Mesh) else None
    return None
