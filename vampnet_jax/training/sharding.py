"""Where arrays live: a mesh of devices, and rules from the names of parameters to its axes.

The model knows nothing of this. The mesh has three axes: `data` divides the batch, `fsdp` divides
the batch and also every parameter with its moments (Rajbhandari et al. 2020, ZeRO-3), `tensor`
divides heads, hidden units and codes (Shoeybi et al. 2019).
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from codec_bridge.errors import InputError
from vampnet_jax.config import ModelConfig

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
"""Axes that divide the batch."""

RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embedding/kernel", PartitionSpec(None, None, "fsdp")),  # [C, d, D]
    (r"embedding/bias", PartitionSpec("fsdp")),  # [D]
    (r"blocks/(query|key|value)", PartitionSpec(None, "fsdp", "tensor")),  # [L, D, H, K]
    (r"blocks/out", PartitionSpec(None, "tensor", None, "fsdp")),  # [L, H, K, D]
    (r"blocks/up", PartitionSpec(None, "fsdp", None, "tensor")),  # [L, D, 2, 2D]
    (r"blocks/down", PartitionSpec(None, "tensor", "fsdp")),  # [L, 2D, D]
    (r"blocks/\w+_norm", PartitionSpec(None, "fsdp")),  # [L, D]
    (r"(query|key|value|up)/a", PartitionSpec(None, "fsdp")),  # adapters, [L, D, r]
    (r"(query|key|value)/b", PartitionSpec(None, None, "tensor")),  # [L, r, H, K]
    (r"up/b", PartitionSpec(None, None, None, ("tensor", "fsdp"))),  # [L, r, 2, 2D]
    (r"out/a", PartitionSpec(None, "tensor")),  # [L, H, K, r]
    (r"down/a", PartitionSpec(None, ("tensor", "fsdp"))),  # [L, 2D, r]
    (r"(out|down)/b", PartitionSpec(None, None, "fsdp")),  # [L, r, D]
    (r"head/kernel", PartitionSpec("fsdp", None, "tensor")),  # [D, Cp, V]
    (r"head/bias", PartitionSpec(None, ("tensor", "fsdp"))),  # [Cp, V]
    (r"position_bias", PartitionSpec(None, "tensor")),  # [32, H]
    (r"norm", PartitionSpec("fsdp")),  # [D]
)
"""The end of a path in the state → which axis of the mesh divides which axis of the array.

The first that matches counts; what matches none is whole on every device, and so is an axis of an
array that its axis of the mesh does not divide. Moments and averages end like their parameters.
"""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, and where the arrays of training lie on it."""

    mesh: Mesh

    @property
    def batch_shards(self) -> int:
        """Into how many parts a batch is divided."""
        return math.prod(self.mesh.shape[axis] for axis in BATCH)

    @property
    def batch(self) -> NamedSharding:
        """Of arrays whose first axis is the batch."""
        return NamedSharding(self.mesh, PartitionSpec(BATCH))

    @property
    def whole(self) -> NamedSharding:
        """Of arrays that every device holds whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    def shardings(self, tree: Any) -> Any:
        """The sharding of every array of a state, or of parameters, by the rules.

        Args:
          tree: arrays or `jax.ShapeDtypeStruct`.
        """

        def rule(path: tuple, leaf: Any) -> NamedSharding:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            for pattern, spec in RULES:
                if re.search(rf"(^|/){pattern}$", name):
                    return NamedSharding(self.mesh, self._fitting(spec, leaf.shape))
            return self.whole

        return jax.tree_util.tree_map_with_path(rule, tree)

    def _fitting(self, spec: PartitionSpec, shape: tuple[int, ...]) -> PartitionSpec:
        """The rule without those axes that do not divide the array."""
        fitting: list[tuple[str, ...]] = []
        for size, axes in zip(shape, (*spec, *[None] * len(shape)), strict=False):
            kept: list[str] = []
            for axis in (axes,) if isinstance(axes, str) else axes or ():
                if size % math.prod(self.mesh.shape[name] for name in (*kept, axis)) == 0:
                    kept.append(axis)
            fitting.append(tuple(kept))
        return PartitionSpec(*(axes or None for axes in fitting))

    def abstract(self, tree: Any) -> Any:
        """Shapes, dtypes and shardings of a state without its values."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            tree,
            self.shardings(tree),
        )

    def split_batch(self, x: jax.Array, axis: int = 0) -> jax.Array:
        """Inside jit: x with its batch axis divided over the mesh and the others whole."""
        spec = PartitionSpec(*[None] * axis, BATCH)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def constrain(self, tree: Any) -> Any:
        """Inside jit: a state, parameters or their gradients, divided by the rules."""
        return jax.lax.with_sharding_constraint(tree, self.shardings(tree))

    def share(self, batch_size: int) -> tuple[int, int]:
        """Which part of a batch this process reads: (number, of how many equal parts).

        Part p of P is rows p·B/P to (p+1)·B/P; processes that share rows read the same part. One
        whose rows are no such part, where `tensor` goes from process to process, reads all.
        """
        rows = self.batch.addressable_devices_indices_map((batch_size,)).values()
        bounds = [index[0].indices(batch_size) for index in rows if index is not None]
        first, last = min(b[0] for b in bounds), max(b[1] for b in bounds)
        size = last - first
        if first % size or batch_size % size:
            return 0, 1
        return first // size, batch_size // size

    def divide(self, batch: np.ndarray) -> jax.Array:
        """Divide a batch that every process has whole."""
        return jax.make_array_from_callback(batch.shape, self.batch, batch.__getitem__)

    def place_batch(self, rows: np.ndarray, batch_size: int) -> jax.Array:
        """Assemble a batch of which every process has read its share."""
        shape = (batch_size, *rows.shape[1:])
        return jax.make_array_from_process_local_data(self.batch, rows, shape)


def place(tree: Any, shardings: Any) -> Any:
    """Arrays that every process has whole in its own memory, divided: a device gets its part only.

    Args:
      tree: of NumPy arrays, the same in every process.
      shardings: a tree like it.
    """

    def divided(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(divided, tree, shardings)


def plan(
    model: ModelConfig,
    batch_size: int,
    mesh: str | None = None,
    *,
    accumulate: int = 1,
    devices: Sequence[Any] | None = None,
) -> Layout:
    """Choose the mesh.

    Of what `mesh` leaves open, `tensor` is 1; `fsdp` takes as many of the other devices as divide
    the model's width, so that everything can be divided evenly, and `data` the rest.

    Args:
      model: its dimensions decide what can be divided.
      batch_size: examples of a step over all devices.
      mesh: such as "data=2,fsdp=4" or "tensor=2"; None leaves everything open.
      accumulate: parts that a batch is computed in, one after the other.
      devices: to use instead of all devices of the job.

    Raises:
      InputError: sizes that do not fit the devices, the model or the batch.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = _sizes(mesh)
    tensor = sizes.get("tensor", 1)
    if model.n_heads % tensor:
        raise InputError(
            f"mesh has tensor={tensor}, which does not divide the model's {model.n_heads} heads; "
            f"choose one of {', '.join(str(n) for n in _divisors(model.n_heads))}."
        )
    if sizes.keys() != set(AXES):
        known = math.prod(sizes.values())
        if len(devices) % known:
            given = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
            raise InputError(
                f"mesh has {given}, which does not divide the number of devices, {len(devices)}."
            )
        rest = len(devices) // known
        if "fsdp" not in sizes:
            sizes["fsdp"] = rest if "data" in sizes else math.gcd(rest, model.embedding_dim)
        sizes.setdefault("tensor", 1)
        sizes.setdefault("data", len(devices) // (sizes["fsdp"] * sizes["tensor"]))
    if model.dtype == "bfloat16-products" and math.prod(sizes.values()) > 1:
        raise InputError(
            "dtype bfloat16-products is for one device; choose float32 or bfloat16 for a mesh of "
            f"{math.prod(sizes.values())}, or the mesh data=1,fsdp=1,tensor=1."
        )
    if model.embedding_dim % sizes["fsdp"]:
        possible = math.gcd(sizes["fsdp"], model.embedding_dim)
        raise InputError(
            f"mesh has fsdp={sizes['fsdp']}, which does not divide the model's width "
            f"{model.embedding_dim}; fsdp={possible} does."
        )
    used = math.prod(sizes.values())
    if used > len(devices) or (used < len(devices) and jax.process_count() > 1):
        raise InputError(f"The mesh needs {used} devices; there are {len(devices)}.")
    parts = sizes["data"] * sizes["fsdp"] * accumulate
    if batch_size % parts:
        lower = batch_size // parts * parts
        raise InputError(
            f"A batch of {batch_size} cannot be divided into {parts} equal parts "
            f"({sizes['data'] * sizes['fsdp']} for the devices"
            f"{f', {accumulate} to accumulate' if accumulate > 1 else ''}); set batch_size to "
            f"{f'{lower} or ' if lower else ''}{lower + parts}, or choose another mesh."
        )
    # Neighbours in this order are in one process, so a process has consecutive rows of a batch.
    devices.sort(key=lambda device: (device.process_index, device.id))
    grid = np.array(devices[:used]).reshape([sizes[axis] for axis in AXES])
    return Layout(Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3))


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _sizes(mesh: str | None) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in (mesh or "").split(","):
        if not part.strip():
            continue
        name, _, number = part.partition("=")
        name = name.strip()
        if name not in AXES or name in sizes or not number.strip().isdecimal() or not int(number):
            raise InputError(
                f"mesh has {part.strip()!r}; write sizes of data, fsdp and tensor, such as "
                "data=2,fsdp=4,tensor=1."
            )
        sizes[name] = int(number)
    return sizes
