"""What was measured, as tables for people and as a plot."""

import os
import statistics
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from codec_bridge.atomic import atomic_write
from vampnet_jax.benchmarking.measuring import FIRST_AUDIO, Measurement, spread
from vampnet_jax.sampling import SamplingOptions

AXES = {
    "batch": "batch",
    "steps": "coarse steps",
    "fine_steps": "fine steps",
    "seconds": "seconds of audio",
}
"""What speed can be plotted against."""


def show(measurement: Measurement, console: Console) -> None:
    """Print one setting's table."""
    m = measurement
    table = Table(title=m.setting.describe(), title_justify="left", box=None, pad_edge=False)
    for column in ("stage", "seconds", "min–max", "x real time", "tokens/s", "TFLOP", "of matmul"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for name, values in m.seconds.items():
        cells = [name, f"{m.median(name):.3f}", f"{min(values):.3f}–{max(values):.3f}"]
        cells.append(f"{m.times_real_time(name):.2f}" if name != FIRST_AUDIO else "")
        if name in m.flops:
            cells.append(f"{m.tokens[name] / m.median(name):,.0f}")
            cells.append(f"{m.flops[name] / 1e12:.3f}")
            cells.append(f"{m.utilisation(name):.0%}")
        table.add_row(*cells)
    console.print(table)
    for name in m.flops:
        rate = statistics.median(m.matmul[name])
        console.print(
            f"{name}: {_steps(m.sampling[name])}, {m.outside(name):.0%} of a step outside the "
            f"transformer, which computes at {m.forward_utilisation(name):.0%} of the matmul "
            f"rate ({rate / 1e9:,.0f} GFLOP/s, {m.dtypes[name]}, measured in this run"
            f"{f', times {m.n_computing} devices' if m.n_computing > 1 else ''})",
            highlight=False,
        )
    console.print(
        f"first run {m.first_run:.1f} s, of which {m.compile_seconds:.1f} s compiling "
        f"{m.n_programs} programs; {_memory(m)}; {m.platform}"
        f"{f' × {m.n_devices}' if m.n_devices > 1 else ''}"
        f"{f', codec on {m.codec_device}' if m.codec_device else ''}\n",
        highlight=False,
    )


def _steps(options: SamplingOptions) -> str:
    each = options.codebook_steps or (options.steps,)
    return f"{'+'.join(map(str, each))} steps"


def _memory(m: Measurement) -> str:
    if m.memory.bytes is None:
        return "peak memory unknown"
    return f"peak memory {m.memory.bytes / 2**30:.2f} GiB ({m.memory.of})"


def ratios(base: Measurement, other: Measurement) -> dict[str, list[float]]:
    """How many times as fast the other setting is, by stage and round.

    Seconds of audio made per second are compared, so batch and length may differ; of the first
    audio, the time until it is there.
    """
    more = other.setting.batch * other.audio_seconds / (base.setting.batch * base.audio_seconds)
    return {
        name: [
            (1 if name == FIRST_AUDIO else more) * a / b
            for a, b in zip(values, other.seconds[name], strict=True)
        ]
        for name, values in base.seconds.items()
        if name in other.seconds
    }


def show_comparison(base: Measurement, other: Measurement, change: str, console: Console) -> None:
    """Print how much faster a change makes each stage."""
    table = Table(
        title=f"with {change}, times as fast", title_justify="left", box=None, pad_edge=False
    )
    table.add_column("stage")
    for column in ("median", "min", "max"):
        table.add_column(column, justify="right")
    for name, values in ratios(base, other).items():
        s = spread(values)
        table.add_row(name, *(f"{s[key]:.2f}" for key in ("median", "min", "max")))
    console.print(table)


def draw(path: str | os.PathLike[str], measurements: Sequence[Measurement]) -> None:
    """Plot speed against what was varied: batch, steps, length (PNG).

    Args:
      path: the file.
      measurements: the first, and those that differ from it in one of these.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {name: line for name in AXES if len(line := _line(measurements, name)) > 1}
    panels = panels or {"batch": list(measurements[:1])}
    figure = Figure(figsize=(1 + 3.6 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (name, line) in zip(all_axes, panels.items(), strict=True):
        x = [_value(m, name) for m in line]
        for stage in line[0].seconds:
            if stage != FIRST_AUDIO:
                axes.plot(x, [m.times_real_time(stage) for m in line], marker="o", label=stage)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(x, [f"{value:g}" for value in x])
        axes.minorticks_off()
        axes.set_xlabel(AXES[name])
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel("times real time")
    all_axes[0].legend(fontsize="small")
    figure.suptitle(measurements[0].setting.describe(), fontsize="small")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _line(measurements: Sequence[Measurement], name: str) -> list[Measurement]:
    """Those that differ from the first in one option only, by its value."""
    first = measurements[0].setting
    line = [m for m in measurements if replace(m.setting, **{name: getattr(first, name)}) == first]
    return sorted(line, key=lambda m: _value(m, name))


def _value(m: Measurement, name: str) -> float:
    """Of an option in AXES; steps as they were done, where the setting leaves them to the model."""
    stage = {"steps": "coarse", "fine_steps": "fine"}.get(name)
    if stage is None:
        return getattr(m.setting, name)
    return m.sampling[stage].total_steps if stage in m.sampling else 0
