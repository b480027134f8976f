"""From measures per excerpt to one row per condition, with intervals."""

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from vampnet_jax.evaluation.conditions import Condition
from vampnet_jax.evaluation.intervals import Interval, bootstrap, mean_interval
from vampnet_jax.evaluation.measuring import Rows
from vampnet_jax.evaluation.sets import frechet_distance, kernel_distance, median_distance

SET_RESAMPLES = 100
"""Of distances between sets, which take longer to compute than means."""


@dataclasses.dataclass(frozen=True)
class Result:
    """A condition's figures."""

    condition: Condition
    figures: dict[str, Interval]


def summarise(
    conditions: list[Condition],
    rows: dict[str, Rows],
    reference: Rows,
    embeddings: tuple[str, ...],
) -> list[Result]:
    """Means with 95 % intervals over excerpts, and distances to the reference set.

    Args:
      conditions: in the order of the result.
      rows: measures of each condition by its slug.
      reference: embeddings of the reference excerpts.
      embeddings: their names.

    Returns:
      figures by name: `mel`, `stft`, … (means), `frechet <embedding>`, `kad <embedding>`, and
      `share <embedding>`: (F − F_codec)/(F_random − F_codec) of the Fréchet distances F, 0 being as
      good as the codec and 1 as bad as random tokens.
    """
    ends = {
        c.kind: rows[c.slug]
        for c in conditions
        if c.kind == "random" or (c.kind == "codec" and not c.codebooks)
    }

    def of(condition: Condition) -> Result:
        own = rows[condition.slug]
        figures = {
            name: mean_interval(values[np.isfinite(values)])
            for name, values in own.items()
            if values.ndim == 1 and np.isfinite(values).any()
        }
        for name in embeddings:
            if len(reference[name]) < 2 or len(own[name]) < 2:
                continue
            figures[f"frechet {name}"] = _between(frechet_distance, reference[name], own[name])
            # Fixed, since a resampled reference repeats itself and so looks narrower.
            bandwidth = median_distance(reference[name])
            if bandwidth > 0:
                distance = functools.partial(kernel_distance, bandwidth=bandwidth)
                figures[f"kad {name}"] = _between(distance, reference[name], own[name])
            if len(ends) == 2 and condition.kind not in ends:
                sets = (reference[name], own[name], ends["codec"][name], ends["random"][name])
                figures[f"share {name}"] = _share_interval(*sets)
        return Result(condition, figures)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(of, conditions))


def summarise_tokens(rows: Rows) -> dict[str, Interval]:
    """Means with intervals of what `measure_tokens` returns."""
    return {name: mean_interval(v[np.isfinite(v)]) for name, v in rows.items()}


def as_json(results: list[Result]) -> list[dict[str, Any]]:
    """Plain lists and dicts of all results."""
    return [
        {
            "experiment": r.condition.experiment,
            "condition": r.condition.name,
            "kind": r.condition.kind,
            "figures": {name: list(interval) for name, interval in r.figures.items()},
        }
        for r in results
    ]


def _between(
    distance: Callable[[np.ndarray, np.ndarray], float], reference: np.ndarray, own: np.ndarray
) -> Interval:
    """Both sets resampled; since repetitions bias such distances, the interval is centred."""
    whole = bootstrap(distance, reference, own, n=SET_RESAMPLES, paired=False)
    half = (whole.high - whole.low) / 2
    return Interval(whole.value, whole.value - half, whole.value + half)


def _share_interval(
    reference: np.ndarray, own: np.ndarray, codec: np.ndarray, random: np.ndarray
) -> Interval:
    """The excerpts resampled alike in all conditions, the reference by itself; centred as above."""
    made = np.stack([own, codec, random], axis=1)  # [N, 3, d]

    def share(reference: np.ndarray, made: np.ndarray) -> float:
        f, best, worst = (frechet_distance(reference, made[:, i]) for i in range(3))
        return (f - best) / (worst - best)

    whole = bootstrap(share, reference, made, n=SET_RESAMPLES, paired=False)
    half = (whole.high - whole.low) / 2
    return Interval(whole.value, whole.value - half, whole.value + half)
