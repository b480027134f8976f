"""Compile the training step for a TPU pod on a machine without one, and say how it would do.

The TPU compiler is a library that needs no TPU (package libtpu); it lays out memory as on the
chip, and refuses what does not fit.
"""

import dataclasses
import importlib.util
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from codec_bridge.errors import InputError
from vampnet_jax.training.collectives import Collective, collectives
from vampnet_jax.training.config import TrainConfig
from vampnet_jax.training.flops import step_flops
from vampnet_jax.training.sharding import Layout, plan
from vampnet_jax.training.step import abstract_state, jitted_step

GIB = 2**30


class Chip(NamedTuple):
    """A TPU chip by its maker's data sheet."""

    flops: float
    """FLOP/s of bfloat16 matrix products."""
    memory: float
    """Bytes that a program can use: a little less than on the sheet."""
    link_rate: float
    """Bytes/s that a chip can send to its neighbours over all its links together."""
    memory_rate: float
    """Bytes/s of its memory."""


CHIPS = {
    "v5e": Chip(197e12, 15.75 * GIB, 200e9, 819e9),
    "v5p": Chip(459e12, 95.74 * GIB, 600e9, 2765e9),
    "v6e": Chip(918e12, 31.25 * GIB, 400e9, 1640e9),
}


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a compiled program takes on one chip, by its compiler."""

    chip: Chip
    arguments: float
    """Bytes of what goes in."""
    temporaries: float
    """Bytes of everything in between."""
    outputs: float
    """Bytes of results that replace no argument."""
    collectives: tuple[Collective, ...]

    @property
    def memory(self) -> float:
        """Bytes in all."""
        return self.arguments + self.temporaries + self.outputs

    @property
    def link_seconds(self) -> float:
        """Time of the collectives at the full rate of all links."""
        return sum(c.sent for c in self.collectives) / self.chip.link_rate


@dataclasses.dataclass(frozen=True)
class Report:
    """What one step of training takes on one chip."""

    needs: Needs
    """Its arguments are the state and the batch; the new state replaces the old one."""
    model_flops: float
    """FLOPs of the matrix products that the model needs."""
    flops: float
    """The same and what is computed again in the backward pass."""

    @property
    def times(self) -> dict[str, float]:
        """Seconds if nothing else limited: computing, links between chips."""
        return {
            "compute": self.flops / self.needs.chip.flops,
            "links": self.needs.link_seconds,
        }

    @property
    def seconds(self) -> tuple[float, float]:
        """A step's time if the two overlap fully, and if they do not at all."""
        return max(self.times.values()), sum(self.times.values())

    def mfu(self, seconds: float) -> float:
        """Model FLOPs utilisation of a step of so many seconds."""
        return self.model_flops / seconds / self.needs.chip.flops


class DoesNotFit(Exception):
    """The compiler found no way to place the step in the chip's memory; says what it needs."""


def devices_of(topology: str) -> tuple[list[Any], Chip]:
    """The devices of a pod slice that need not exist.

    Args:
      topology: such as v5e:16x16 or v5p:8x8x4.

    Raises:
      InputError: no such topology, or libtpu is not installed.
    """
    kind = topology.partition(":")[0]
    if kind not in CHIPS:
        raise InputError(f"topology is {topology!r}; choose {', '.join(CHIPS)}, such as v5e:16x16.")
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("Compiling for a TPU needs its compiler; install vampnet-jax[tpu].")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # this machine's own TPU is not asked for
    from jax.experimental import topologies

    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:  # the TPU library raises its own kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"topology is {topology!r}, which the TPU compiler refuses ({reason})."
        ) from error
    return list(description.devices), CHIPS[kind]


def compile_step(config: TrainConfig, layout: Layout, n_frames: int) -> jax.stages.Compiled:
    """Compile the training step for the layout's devices.

    Raises:
      DoesNotFit: it needs more memory than the chip has.
    """
    model = config.model
    state = layout.abstract(abstract_state(config))
    shape = (config.batch_size, model.n_codebooks, n_frames)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=layout.batch)
    done = jax.ShapeDtypeStruct((), jnp.float32, sharding=layout.whole)
    return compiled(jitted_step(config, layout).lower(state, tokens, done))


def compiled(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compile a program for the devices that it was lowered for.

    Raises:
      DoesNotFit: it needs more memory than the chip has.
    """
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        wanted = [line.strip() for line in str(error).splitlines() if "hbm" in line.lower()]
        raise DoesNotFit(wanted[0] if wanted else str(error).splitlines()[0]) from error


def needs(program: jax.stages.Compiled, chip: Chip) -> Needs:
    """Read a compiled program's needs."""
    memory: Any = program.memory_analysis()
    return Needs(
        chip=chip,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        collectives=tuple(collectives(program.as_text() or "")),
    )


def measure(step: jax.stages.Compiled, config: TrainConfig, n_frames: int, chip: Chip) -> Report:
    """Read a compiled step's needs, and count its FLOPs; all per chip."""
    n_chips = len(jax.tree.leaves(step.input_shardings)[0].device_set)
    return Report(
        needs=needs(step, chip),
        model_flops=step_flops(config, n_frames) / n_chips,
        flops=(step_flops(config, n_frames) + _computed_again(config, n_frames)) / n_chips,
    )


def _computed_again(config: TrainConfig, n_frames: int) -> float:
    """FLOPs of matrix products that `remat` computes a second time, of a step.

    The compiler's own count takes a loop's body once, however often it runs.
    """
    model = config.model
    product = 2.0 * n_frames * model.embedding_dim  # of queries and keys, or weights and values
    weights = 2.0 * 10 * model.embedding_dim**2
    per_layer = {
        "none": 0.0,
        "attention": product,
        "dots": 2 * product,
        "full": 2 * product + weights,
    }
    return config.batch_size * n_frames * model.n_layers * per_layer[model.remat]


def check(
    config: TrainConfig, n_frames: int, topology: str, mesh: str | None, console: Console
) -> bool:
    """Compile for a pod and print what it takes; returns whether it fits.

    Args:
      config: of the run; its batch is that of all chips.
      n_frames: T, frames per excerpt.
      topology: as `devices_of` takes it.
      mesh: as `vampnet_jax.training.sharding.plan` takes it.
      console: to print on.

    Raises:
      InputError: unknown topology, no libtpu, or a mesh or batch that does not fit the chips.
    """
    devices, chip = devices_of(topology)
    layout = plan(
        config.model, config.batch_size, mesh, accumulate=config.accumulate, devices=devices
    )
    axes = ", ".join(f"{axis} {size}" for axis, size in layout.mesh.shape.items())
    console.print(
        f"{topology}: {len(devices)} chips, mesh {axes}; batch {config.batch_size} of {n_frames} "
        f"frames, {config.model.dtype}, remat {config.model.remat}",
        highlight=False,
    )
    if config.lora is not None:
        n_trained = sum(x.size for x in jax.tree.leaves(abstract_state(config).params))
        console.print(
            f"LoRA: {n_trained / 1e6:.1f} M parameters in adapters of rank {config.lora.rank} of "
            f"{', '.join(config.lora.targets)}",
            highlight=False,
        )
    try:
        report = measure(compile_step(config, layout, n_frames), config, n_frames, chip)
    except DoesNotFit as error:
        console.print(f"does not fit: {error}", soft_wrap=True, markup=False)
        return False
    console.print(_table(report))
    fits = report.needs.memory <= chip.memory
    console.print("fits" if fits else "does not fit")
    return fits


def _table(report: Report) -> Table:
    table = Table("per chip and step", "", show_header=True, box=None)
    found = report.needs
    share = found.memory / found.chip.memory
    overlapped, apart = report.seconds
    rows = [
        ("arguments", f"{found.arguments / GIB:.2f} GiB"),
        ("temporaries", f"{found.temporaries / GIB:.2f} GiB"),
        ("outputs not in place", f"{found.outputs / GIB:.2f} GiB"),
        (
            "memory",
            f"{found.memory / GIB:.2f} of {found.chip.memory / GIB:.2f} GiB ({share:.0%})",
        ),
        ("model FLOPs", f"{report.model_flops / 1e12:.2f} T"),
        ("with what is computed again", f"{report.flops / 1e12:.2f} T"),
        *(
            (item.kind, f"{item.calls} × , {item.bytes / 1e6:,.1f} MB, {item.sent / 1e6:,.1f} sent")
            for item in found.collectives
        ),
        *((f"time by {what}", f"{1e3 * t:.1f} ms") for what, t in report.times.items()),
        ("roofline step time", f"{1e3 * overlapped:.1f} to {1e3 * apart:.1f} ms"),
        ("roofline MFU", f"{report.mfu(apart):.0%} to {report.mfu(overlapped):.0%}"),
    ]
    for row in rows:
        table.add_row(*row)
    return table
