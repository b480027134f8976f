"""Bootstrap intervals: how far a figure may lie off because the recordings are a sample."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A figure and the interval that holds it with the probability that was asked for."""

    value: float
    low: float
    high: float


def bootstrap(
    statistic: Callable[..., float],
    *samples: np.ndarray,
    n: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    paired: bool = True,
) -> Interval:
    """Percentile bootstrap of a statistic.

    Args:
      statistic: called with as many arrays as there are samples.
      samples: arrays whose first axis counts recordings.
      n: resamples.
      level: probability that the interval holds.
      seed: the same seed gives the same interval.
      paired: row i of all samples belongs to one recording, so all are resampled alike.

    Source: Efron & Tibshirani 1993, chapter 13.
    """
    sizes = {len(sample) for sample in samples}
    if not samples or 0 in sizes or (paired and len(sizes) > 1):
        raise ValueError(f"samples have lengths {[len(s) for s in samples]}; paired ones need one")
    rng = np.random.default_rng(seed)
    values = np.empty(n)
    for i in range(n):
        if paired:
            rows = rng.integers(0, len(samples[0]), len(samples[0]))
            values[i] = statistic(*(sample[rows] for sample in samples))
        else:
            values[i] = statistic(*(s[rng.integers(0, len(s), len(s))] for s in samples))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(statistic(*samples)), float(low), float(high))


def mean_interval(values: np.ndarray, *, n: int = 1000, seed: int = 0) -> Interval:
    """The mean of float `[N]` with its 95 % bootstrap interval."""
    return bootstrap(lambda x: float(np.mean(x)), np.asarray(values, float), n=n, seed=seed)
