"""Measure what is made of excerpts, batch by batch; what is done is kept and not done again.

The excerpts are numbered and measured in fixed batches, and every draw depends on the
seed and the excerpt's number: a run that is interrupted and resumed gives the same numbers.
"""

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from codec_bridge import audio as signal
from codec_bridge.atomic import atomic_write
from codec_bridge.audio import Audio
from vampnet_jax.compression.compressor import Compressor
from vampnet_jax.evaluation.artefacts import clicks
from vampnet_jax.evaluation.conditions import Condition
from vampnet_jax.evaluation.distances import SAMPLE_RATE, Spectra
from vampnet_jax.evaluation.embeddings import EMBEDDINGS
from vampnet_jax.evaluation.excerpts import Excerpt
from vampnet_jax.evaluation.making import HIDDEN_TOKENS, Originals, Rows, make, spectra
from vampnet_jax.evaluation.token_scores import score_tokens

MEASURES = 1
"""Raised with every change of what a measure is or how recordings are made: kept measurements of
another version are not continued."""
BATCH = 4
"""Excerpts that are generated together."""
REFERENCE, TOKENS = "reference", "tokens"
RATIOS = (0.25, 0.5, 0.75, 1.0)
"""Shares of masked tokens at which the models' predictions are scored."""


@dataclasses.dataclass(frozen=True, eq=False)
class Bench:
    """What is measured, and with what."""

    compressor: Compressor
    conditions: list[Condition]
    excerpts: list[Excerpt]
    reference: list[Excerpt]
    """As many others, which stand for real music in distances between sets."""
    embeddings: tuple[str, ...]
    seed: int
    folder: Path
    """Where measurements are kept."""
    n_listen: int
    """The first so many recordings of every condition are kept to be listened to."""


@dataclasses.dataclass(frozen=True, eq=False)
class Measurements:
    """One row per excerpt."""

    conditions: list[Rows]
    """In the order of the bench."""
    reference: Rows
    """Embeddings of the reference excerpts."""
    tokens: Rows
    """`coarse/nll/0.5` and so on: nats per masked token and accuracy, by share of masked tokens, in
    the first window."""


def measure(bench: Bench, on_progress: Callable[[str, int, int], None]) -> Measurements:
    """Measure everything; `on_progress` is called as that of `run.evaluate`."""
    starts = range(0, len(bench.excerpts), BATCH)
    parts: dict[str, list[Rows]] = {}
    for number, start in enumerate(starts):
        batch = range(start, min(start + BATCH, len(bench.excerpts)))
        originals, others = (
            Originals(bench.compressor, excerpts, batch, bench.seed)
            for excerpts in (bench.excerpts, bench.reference)
        )
        work: list[tuple[str, str, Callable[[], Rows]]] = [
            (REFERENCE, REFERENCE, functools.partial(_of_reference, bench, others)),
            (TOKENS, TOKENS, functools.partial(_of_tokens, bench, originals)),
        ]
        work += [
            (c.slug, c.name, functools.partial(_of_condition, bench, c, originals))
            for c in bench.conditions
        ]
        for slug, name, rows_of in work:
            path = bench.folder / "measurements" / f"{slug}-{number:04d}.npz"
            parts.setdefault(slug, []).append(_kept(path, rows_of))
            on_progress(name, number + 1, len(starts))
    rows = {
        slug: {name: np.concatenate([part[name] for part in own]) for name in own[0]}
        for slug, own in parts.items()
    }
    return Measurements([rows[c.slug] for c in bench.conditions], rows[REFERENCE], rows[TOKENS])


def _of_condition(bench: Bench, condition: Condition, originals: Originals) -> Rows:
    """All measures of a condition."""
    made, rows = make(bench.compressor, condition, originals)
    _keep_to_listen(bench, condition.slug, originals.numbers, made)
    recordings = spectra(made, bench.compressor.model.codec)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, distance in (("mel", Spectra.mel_distance), ("stft", Spectra.stft_distance)):
            rows[name] = np.array(list(pool.map(distance, originals.spectra, recordings)))
    rows["clicks"] = np.array([float(len(clicks(x.audio, SAMPLE_RATE))) for x in recordings])
    return rows | _embedded(bench, recordings)


def _of_reference(bench: Bench, reference: Originals) -> Rows:
    return _embedded(bench, reference.spectra)


def _embedded(bench: Bench, recordings: list[Spectra]) -> Rows:
    return {name: np.stack([EMBEDDINGS[name](x) for x in recordings]) for name in bench.embeddings}


def _of_tokens(bench: Bench, originals: Originals) -> Rows:
    """What the models make of tokens that they have not seen; keeps the originals to listen to."""
    _keep_to_listen(bench, "original", originals.numbers, originals.audio)
    model, rows = bench.compressor.model, Rows()
    for name, stage, window in (
        ("coarse", model.coarse, model.coarse_window),
        ("fine", model.fine, model.fine_window),
    ):
        first = originals.tokens[:, : stage.config.n_codebooks, :window]
        draw = jax.vmap(lambda key, shape=first.shape[1:]: jax.random.uniform(key, shape))
        draws = np.asarray(draw(originals.keys(HIDDEN_TOKENS)))
        for ratio in RATIOS:
            scores = score_tokens(stage, first, draws < ratio)
            rows[f"{name}/nll/{ratio:g}"] = scores.nll
            rows[f"{name}/accuracy/{ratio:g}"] = scores.accuracy
    return rows


def _kept(path: Path, rows_of: Callable[[], Rows]) -> Rows:
    """The rows that a file holds; computed and written if it is not there yet."""
    if not path.is_file():
        rows: dict[str, Any] = dict(rows_of())
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **rows)
    with np.load(path, allow_pickle=False) as kept:
        return {name: kept[name] for name in kept.files}


def _keep_to_listen(bench: Bench, name: str, numbers: range, made: np.ndarray) -> None:
    rate = bench.compressor.model.codec.sample_rate
    folder = bench.folder / "audio"
    for number, samples in zip(numbers, made, strict=True):
        if number < bench.n_listen:
            folder.mkdir(parents=True, exist_ok=True)
            audio = Audio(samples[None], rate)
            signal.write(folder / f"{name}-{number}.flac", audio, overwrite=True)
