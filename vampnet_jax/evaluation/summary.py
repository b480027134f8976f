"""From measures per excerpt to one row per condition, with intervals."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from vampnet_jax.evaluation.conditions import Condition
from vampnet_jax.evaluation.intervals import Interval, centred_interval, mean_interval, resampled
from vampnet_jax.evaluation.making import Rows
from vampnet_jax.evaluation.measuring import Measurements
from vampnet_jax.evaluation.sets import frechet_distance, kernel_distance, median_distance

SET_RESAMPLES = 100
"""Of distances between sets, which take longer to compute than means."""


@dataclasses.dataclass(frozen=True)
class Result:
    """A condition's figures."""

    condition: Condition
    figures: dict[str, Interval]


def summarise(
    conditions: list[Condition], measured: Measurements, embeddings: tuple[str, ...]
) -> list[Result]:
    """Means with 95 % intervals over excerpts, and distances to the reference set.

    Args:
      conditions: those that were measured, in their order.
      measured: at least 2 excerpts.
      embeddings: their names.

    Returns:
      figures by name: `mel`, `stft`, … (means), `mel change` (from the condition before it in the
      same experiment, excerpt by excerpt), `frechet <embedding>`, `kad <embedding>`, and
      `share <embedding>`: (F − F_codec)/(F_random − F_codec) of the Fréchet distances F, 0 being as
      good as the codec and 1 as bad as random tokens.
    """
    figures = [_means(rows) for rows in measured.conditions]
    before: dict[str, np.ndarray] = {}
    for condition, rows, own in zip(conditions, measured.conditions, figures, strict=True):
        if condition.experiment in before:
            own["mel change"] = mean_interval(rows["mel"] - before[condition.experiment])
        before[condition.experiment] = rows["mel"]
    for name in embeddings:
        made = np.stack([rows[name] for rows in measured.conditions], axis=1)
        between = _between_sets(conditions, measured.reference[name], made)
        for own, found in zip(figures, between, strict=True):
            own.update({f"{sort} {name}": interval for sort, interval in found.items()})
    return [Result(c, own) for c, own in zip(conditions, figures, strict=True)]


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


def _means(rows: Rows) -> dict[str, Interval]:
    """Of all measures that are one number per excerpt, where there are any."""
    return {
        name: mean_interval(values[np.isfinite(values)])
        for name, values in rows.items()
        if values.ndim == 1 and np.isfinite(values).any()
    }


def _between_sets(
    conditions: list[Condition], reference: np.ndarray, made: np.ndarray
) -> list[dict[str, Interval]]:
    """Fréchet and kernel distance, and share, of each condition.

    The excerpts are resampled alike in all conditions, the reference by itself.

    Args:
      conditions: K of them.
      reference: embeddings `[N, d]`.
      made: embeddings `[N, K, d]`.
    """
    measures: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {"frechet": frechet_distance}
    # Fixed, since a resampled reference repeats itself and so looks narrower.
    bandwidth = median_distance(reference)
    if bandwidth > 0:
        measures["kad"] = functools.partial(kernel_distance, bandwidth=bandwidth)

    def distances(reference: np.ndarray, made: np.ndarray) -> np.ndarray:
        sets = made.swapaxes(0, 1)
        return np.array([[measure(reference, x) for x in sets] for measure in measures.values()])

    values = distances(reference, made)  # [measures, K]
    draws = resampled(distances, reference, made, n=SET_RESAMPLES, paired=False)
    found: list[dict[str, Interval]] = [{} for _ in conditions]
    for i, name in enumerate(measures):
        for k, own in enumerate(found):
            own[name] = centred_interval(values[i, k], draws[:, i, k])
    best, worst = (
        next((k for k, c in enumerate(conditions) if c.kind == kind and not c.codebooks), None)
        for kind in ("codec", "random")
    )
    if best is not None and worst is not None:
        for k in set(range(len(conditions))) - {best, worst}:
            share, *shares = (
                (f[k] - f[best]) / (f[worst] - f[best]) for f in (values[0], *draws[:, 0])
            )
            found[k]["share"] = centred_interval(share, np.array(shares))
    return found
