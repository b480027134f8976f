"""Bootstrap intervals: how far a figure may lie off because the recordings are a sample."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A figure and the interval that holds it with the probability that was asked for."""

    value: float
    low: float
    high: float


def resampled(
    statistic: Callable[..., float | np.ndarray],
    *samples: np.ndarray,
    n: int = 1000,
    seed: int = 0,
    paired: bool = True,
) -> np.ndarray:
    """A statistic, of one number or of several, of n bootstrap resamples: float64 `[n, ...]`.

    Args:
      statistic: called with as many arrays as there are samples.
      samples: arrays whose first axis counts recordings.
      n: resamples.
      seed: the same seed gives the same resamples.
      paired: row i of all samples belongs to one recording, so all are resampled alike.

    Source: Efron & Tibshirani 1993, chapter 13.
    """
    sizes = {len(sample) for sample in samples}
    if not samples or 0 in sizes or (paired and len(sizes) > 1):
        raise ValueError(f"samples have lengths {[len(s) for s in samples]}; paired ones need one")
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(n):
        if paired:
            rows = rng.integers(0, len(samples[0]), len(samples[0]))
            values.append(statistic(*(sample[rows] for sample in samples)))
        else:
            values.append(statistic(*(s[rng.integers(0, len(s), len(s))] for s in samples)))
    return np.array(values, np.float64)


def percentiles(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Ends of the interval that holds a share `level` of resampled values `[n]`."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_interval(values: np.ndarray, *, n: int = 1000, seed: int = 0) -> Interval:
    """The mean of float `[N]` with its 95 % percentile interval."""
    values = np.asarray(values, np.float64)
    return Interval(float(values.mean()), *percentiles(resampled(np.mean, values, n=n, seed=seed)))


def centred_interval(value: float, values: np.ndarray) -> Interval:
    """A 95 % interval as wide as that of the resampled values `[n]`, around the figure itself.

    For distances between sets: resamples repeat recordings, which biases such distances.
    """
    low, high = percentiles(values)
    return Interval(float(value), float(value) - (high - low) / 2, float(value) + (high - low) / 2)
