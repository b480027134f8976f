"""Compile sampling for TPU chips that are not here, and say what it takes and the least it lasts.

The TPU compiler needs no TPU; it lays out memory as on the chip and refuses what does not fit.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from codec_bridge.errors import InputError
from vampnet_jax import model as network
from vampnet_jax import placement, vamping
from vampnet_jax.benchmarking.flops import sampling_flops
from vampnet_jax.benchmarking.settings import OFFICIAL, OFFICIAL_FRAME_RATE, Setting, frames
from vampnet_jax.config import ModelConfig
from vampnet_jax.release import read_description, resolve, sampling_defaults
from vampnet_jax.sampling import SamplingOptions, generate
from vampnet_jax.training import pod_check
from vampnet_jax.training.pod_check import GIB, DoesNotFit, Needs, devices_of
from vampnet_jax.training.sharding import Layout


@dataclasses.dataclass(frozen=True)
class Work:
    """What a stage's program does: one batch of windows, all steps."""

    name: str
    config: ModelConfig
    options: SamplingOptions
    rows: int
    """Windows in the batch, over all chips."""
    n_frames: int
    """Of a window."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a program takes on one chip."""

    needs: Needs
    """Its arguments are parameters and tokens."""
    flops: float
    """Model FLOPs of all steps, by formula."""
    traffic: float
    """Bytes that have to be moved to and from memory at least: every parameter that a step uses
    once, the logits written and read once."""

    @property
    def times(self) -> dict[str, float]:
        """Seconds if nothing else limited."""
        return {
            "compute": self.flops / self.needs.chip.flops,
            "memory": self.traffic / self.needs.chip.memory_rate,
            "links": self.needs.link_seconds,
        }


def works(setting: Setting) -> list[Work]:
    """The programs that a setting runs, without loading any weights."""
    rate, windows, configs, sampling = OFFICIAL_FRAME_RATE, {}, {}, {}
    if setting.config is not None:
        published = OFFICIAL[setting.config]
        windows[setting.config] = frames(published.seconds)
        configs[setting.config], sampling[setting.config] = published.config, published.sampling
    else:
        description = read_description(resolve(setting.model))
        rate = description["codec"]["sample_rate"] / description["codec"]["hop_length"]
        for name in ("coarse", "fine"):
            windows[name] = description[name]["window"]
            configs[name] = ModelConfig(**description[name]["config"])
            sampling[name] = sampling_defaults(description, name)
    n_frames = frames(setting.seconds, rate)
    found = []
    for name, window in windows.items():
        together = 1
        if name == "fine":
            starts = vamping.window_starts(n_frames, window)
            together = max(map(len, vamping.independent(starts, window)))
        length = vamping.bucket(min(n_frames, window), window)
        options = setting.sampling(name, sampling[name])
        config = setting.computing(configs[name])
        found.append(Work(name, config, options, together * setting.batch, length))
    return found


def abstract_params(config: ModelConfig) -> network.Params:
    """Shapes and dtypes of a model's parameters."""
    shape = (config.n_codebooks, config.vocab_size, config.latent_dim)
    codebooks = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(lambda c: network.init(jax.random.key(0), config, c), codebooks)


def compile_work(work: Work, layout: Layout) -> jax.stages.Compiled:
    """Compile a stage for the layout's devices, the batch divided among them.

    Raises:
      DoesNotFit: it needs more memory than a chip has.
    """
    config = work.config

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.batch)

    tokens = (work.rows, config.n_codebooks, work.n_frames)
    keys = array((work.rows,), jax.eval_shape(lambda: jax.random.key(0)).dtype)

    @jax.jit
    def run(params: network.Params, tokens: jax.Array, mask: jax.Array, keys: jax.Array):
        return generate(params, tokens, mask, keys, config, work.options)

    lowered = run.lower(
        layout.abstract(abstract_params(config)),
        array(tokens, jnp.int32),
        array(tokens, bool),
        keys,
    )
    return pod_check.compiled(lowered)


def estimate(
    compiled: jax.stages.Compiled, work: Work, layout: Layout, chip: pod_check.Chip
) -> Estimate:
    """Read a compiled program's needs, and count its work; all per chip."""
    config, options, n_chips = work.config, work.options, layout.mesh.size
    n_predicted = options.codebooks_per_step(config)
    logits = 4 * work.rows * work.n_frames * n_predicted * config.vocab_size / n_chips
    params = layout.abstract(abstract_params(config))
    whole_head = _held(params["head"])
    body = _held(params) - whole_head
    head = whole_head * n_predicted // config.n_predicted_codebooks
    passes, heads = options.total_steps, options.total_steps
    if options.guidance is not None:  # one pass more, and its logits in every step
        passes, heads = passes + 1, 2 * heads
    return Estimate(
        needs=pod_check.needs(compiled, chip),
        flops=work.rows * sampling_flops(config, options, work.n_frames) / n_chips,
        traffic=passes * body + heads * (head + 2 * logits),
    )


def _held(params: network.Params) -> int:
    """Bytes of parameters on one chip."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(params)
    )


def check(setting: Setting, topology: str, console: Console) -> bool:
    """Compile every stage for a pod slice and print what it takes; returns whether all fit.

    Args:
      setting: its batch is that of all chips; its mesh, by default, gives each chip its examples.
      topology: such as v5e:2x2.
      console: to print on.

    Raises:
      InputError: unknown topology, no compiler for it, or a mesh or batch that does not fit.
    """
    devices, chip = devices_of(topology)
    fits = True
    for work in works(setting):
        layout = Layout(placement.mesh_of(setting.mesh or "", work.config, devices))
        if work.rows % layout.batch_shards:
            raise InputError(
                f"--batch {setting.batch} makes {work.rows} {work.name} windows, which "
                f"{layout.batch_shards} parts of the mesh cannot share evenly; choose a multiple "
                f"of {layout.batch_shards}."
            )
        axes = ", ".join(f"{axis} {size}" for axis, size in layout.mesh.shape.items())
        console.print(
            f"{topology}: {len(devices)} chips, mesh {axes}; {work.name}: {work.rows} windows of "
            f"{work.n_frames} frames, {work.options.total_steps} steps, {work.config.dtype}",
            highlight=False,
        )
        try:
            found = estimate(compile_work(work, layout), work, layout, chip)
        except DoesNotFit as error:
            console.print(f"does not fit: {error}\n", highlight=False)
            fits = False
            continue
        console.print(_table(found, work, len(devices)))
    return fits


def _table(found: Estimate, work: Work, n_chips: int) -> Table:
    needs = found.needs
    table = Table("per chip, one batch", "", box=None)
    table.add_row("parameters and tokens", f"{needs.arguments / GIB:.2f} GiB")
    table.add_row("temporaries", f"{needs.temporaries / GIB:.2f} GiB")
    share = needs.memory / needs.chip.memory
    table.add_row(
        "memory", f"{needs.memory / GIB:.2f} of {needs.chip.memory / GIB:.2f} GiB ({share:.0%})"
    )
    table.add_row("model FLOPs", f"{found.flops / 1e12:.2f} T")
    table.add_row("memory traffic, at least", f"{found.traffic / 1e9:.1f} GB")
    for item in needs.collectives:
        table.add_row(item.kind, f"{item.calls} ×, {item.sent / 1e6:,.1f} MB sent")
    for what, seconds in found.times.items():
        table.add_row(f"time by {what}", f"{1e3 * seconds:.2f} ms")
    least = max(found.times.values())
    table.add_row("least time (roofline)", f"{1e3 * least:.2f} ms")
    tokens = work.rows * work.n_frames * work.config.n_predicted_codebooks
    table.add_row("tokens/s at most, all chips", f"{tokens / least:,.0f}")
    return table
