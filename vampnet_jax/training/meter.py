"""Averages between two reports: metrics of the steps, rates, and where the time went."""

import collections
import contextlib
import math
import time
from collections.abc import Iterator, Mapping


class Meter:
    """Adds up what happens between reports.

    Args:
      tokens_per_step: of the global batch, all codebooks.
      flops_per_step: model FLOPs of the global batch.
      peak_flops: FLOP/s of all devices together, for the utilisation (MFU).
    """

    def __init__(self, tokens_per_step: int, flops_per_step: float, peak_flops: float) -> None:
        self._per_step = {"tokens/s": tokens_per_step, "MFU": flops_per_step / peak_flops}
        self.restart()

    def restart(self) -> None:
        """Count from now on, as if nothing had been before."""
        self._began = time.monotonic()
        self._totals: dict[str, list[float]] = collections.defaultdict(list)
        self._waited = {"data": 0.0, "checkpoints": 0.0}
        self._paused = 0.0

    def add(self, metrics: Mapping[str, float]) -> None:
        """Add the metrics of one step."""
        for name, value in metrics.items():
            self._totals[name].append(value)

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """A context in which no step can be started: waiting for `data` or `checkpoints`."""
        before = time.monotonic()
        try:
            yield
        finally:
            self._waited[what] += time.monotonic() - before

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context that counts as no time at all: validation, making audio."""
        before = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - before

    def report(self) -> dict[str, float]:
        """The averages since the last report; then starts anew.

        Means of the steps' metrics (NaN where none is known), `steps/s`, `tokens/s`, `MFU`, and
        the shares of the time `waiting for data` and `waiting for checkpoints`.
        """
        elapsed = max(time.monotonic() - self._began - self._paused, 1e-9)
        averages = {name: _mean(values) for name, values in self._totals.items()}
        steps = max(map(len, self._totals.values()), default=0)
        averages["steps/s"] = steps / elapsed
        for name, amount in self._per_step.items():
            averages[name] = amount * steps / elapsed
        for what, seconds in self._waited.items():
            averages[f"waiting for {what}"] = seconds / elapsed
        self.restart()
        return averages


def _mean(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
