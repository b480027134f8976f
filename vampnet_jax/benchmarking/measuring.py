"""Run workloads alternately and keep every time; say what it took to compile and to hold."""

import contextlib
import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.monitoring

from vampnet_jax.benchmarking import memory
from vampnet_jax.benchmarking.memory import Peak
from vampnet_jax.benchmarking.settings import Setting
from vampnet_jax.benchmarking.workload import FIRST_AUDIO, Seconds, Workload
from vampnet_jax.sampling import SamplingOptions

COMPILING = (
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)
"""What JAX reports: lowering a program, and compiling it."""

Progress = Callable[[str, int, int], None]
"""Called with what is measured, rounds done and rounds in all."""


@dataclasses.dataclass
class Measurement:
    """What was measured of one setting."""

    setting: Setting
    audio_seconds: float
    """Of one example."""
    tokens: dict[str, int]
    """That each stage predicts, over the batch."""
    flops: dict[str, int]
    """Model FLOPs of each stage."""
    sampling: dict[str, SamplingOptions]
    """How each stage was sampled."""
    platform: str
    """cpu, gpu or tpu: what the transformers compute on."""
    n_devices: int
    dtypes: dict[str, str]
    """What each stage computes in."""
    codec_device: str | None
    first_run: float = 0.0
    """Seconds of the first run, compilation included."""
    compile_seconds: float = 0.0
    """Of which JAX was lowering and compiling."""
    n_programs: int = 0
    """That were compiled."""
    seconds: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """Each stage's time in each round."""
    forward: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """The time that a stage's forward passes alone take."""
    matmul: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """FLOP/s of matrix products shaped like the stage's, on one device, in each round."""
    memory: Peak = memory.UNKNOWN

    def median(self, stage: str) -> float:
        """Seconds."""
        return statistics.median(self.seconds[stage])

    def times_real_time(self, stage: str) -> float:
        """Seconds of audio, over the batch, per second."""
        return self.setting.batch * self.audio_seconds / self.median(stage)

    def utilisation(self, stage: str) -> float:
        """Model FLOP/s as a share of the matmul rate of the same round; median over rounds."""
        rates = zip(self.seconds[stage], self.matmul[stage], strict=True)
        shares = [self.flops[stage] / s / (rate * self.n_computing) for s, rate in rates]
        return statistics.median(shares)

    def forward_utilisation(self, stage: str) -> float:
        """The same of the transformer alone."""
        rates = zip(self.forward[stage], self.matmul[stage], strict=True)
        shares = [self.flops[stage] / s / (rate * self.n_computing) for s, rate in rates]
        return statistics.median(shares)

    def outside(self, stage: str) -> float:
        """Share of the stage's time spent outside the transformer; median over rounds."""
        pairs = zip(self.forward[stage], self.seconds[stage], strict=True)
        return statistics.median(1 - inner / whole for inner, whole in pairs)

    @property
    def n_computing(self) -> int:
        """Devices that add computing power: those of a CPU share its cores."""
        return 1 if self.platform == "cpu" else self.n_devices

    def as_json(self) -> dict[str, Any]:
        """Everything, for machines; seconds, bytes, FLOP/s."""
        stages: dict[str, dict[str, Any]] = {}
        for name, values in self.seconds.items():
            stages[name] = {"seconds": spread(values)}
            if name != FIRST_AUDIO:
                stages[name]["times_real_time"] = self.times_real_time(name)
            if name in self.flops:
                stages[name] |= {
                    "tokens": self.tokens[name],
                    "tokens_per_second": self.tokens[name] / self.median(name),
                    "flops": self.flops[name],
                    "flops_per_second": self.flops[name] / self.median(name),
                    "matmul_flops_per_second": spread(self.matmul[name]),
                    "utilisation": self.utilisation(name),
                    "forward_seconds": spread(self.forward[name]),
                    "forward_utilisation": self.forward_utilisation(name),
                    "share_outside_transformer": self.outside(name),
                    "dtype": self.dtypes[name],
                    "steps": self.sampling[name].total_steps,
                    "sampling": dataclasses.asdict(self.sampling[name]),
                }
        return {
            "setting": dataclasses.asdict(self.setting),
            "audio_seconds": self.audio_seconds,
            "platform": self.platform,
            "devices": self.n_devices,
            "codec_device": self.codec_device,
            "first_run_seconds": self.first_run,
            "compile_seconds": self.compile_seconds,
            "programs_compiled": self.n_programs,
            "stages": stages,
            "peak_memory": self.memory._asdict(),
        }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, extremes, and all values in order."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "all": list(values),
    }


def measure(
    settings: Sequence[Setting], repeats: int, on_progress: Progress | None = None
) -> list[Measurement]:
    """Measure settings alternately: in every round each is run once, in turning order.

    The first run of each, which compiles, and a second one are no round.

    Args:
      settings: one, or those to compare.
      repeats: rounds.
      on_progress: called after every run.
    """
    done, total = 0, len(settings) * (repeats + 2)

    def report(setting: Setting) -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(setting.describe(), done, total)

    memory.reset()
    runs = []
    for setting in settings:
        runs.append(_first_run(setting))
        report(setting)
    for measurement, workload in runs:
        _round(workload, 0)
        report(measurement.setting)
    for index in range(repeats):
        for measurement, workload in runs if index % 2 == 0 else runs[::-1]:
            values = _round(workload, index + 1)
            kept = (measurement.seconds, measurement.forward, measurement.matmul)
            for lists, new in zip(kept, values, strict=True):
                for name, value in new.items():
                    lists.setdefault(name, []).append(value)
            report(measurement.setting)
    for measurement, workload in runs:
        measurement.memory = memory.peak(workload.devices)
    return [measurement for measurement, _ in runs]


def _first_run(setting: Setting) -> tuple[Measurement, Workload]:
    with counted_compilations() as compiled:
        workload = Workload(setting)
        compiled.clear()  # making random weights is not part of the work
        laps = workload.run(seed=0)
    measurement = Measurement(
        setting=setting,
        audio_seconds=workload.audio_seconds,
        tokens=workload.tokens(),
        flops=workload.flops(),
        sampling=workload.sampling,
        platform=workload.devices[0].platform,
        n_devices=len(workload.devices),
        dtypes={name: config.dtype for name, config in workload.configs().items()},
        codec_device=workload.codec_device,
        first_run=laps.get("everything", sum(laps.values())),
        compile_seconds=sum(seconds for _, seconds in compiled),
        n_programs=sum(event == COMPILING[-1] for event, _ in compiled),
    )
    return measurement, workload


def _round(workload: Workload, seed: int) -> tuple[Seconds, Seconds, Seconds]:
    return workload.run(seed), workload.forward(), workload.matmul_rates()


@contextlib.contextmanager
def counted_compilations() -> Iterator[list[tuple[str, float]]]:
    """A context that gives a growing list of what JAX lowers and compiles: (event, seconds)."""
    found: list[tuple[str, float]] = []

    def listen(event: str, duration_secs: float, **rest: str | int) -> None:
        if event in COMPILING:
            found.append((event, duration_secs))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
