"""`evaluate`: excerpts of a folder, made and measured under all conditions, and the report."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from codec_bridge.atomic import atomic_write
from codec_bridge.errors import InputError
from vampnet_jax.compression.compressor import Compressor
from vampnet_jax.evaluation.conditions import Condition
from vampnet_jax.evaluation.embeddings import check_installed
from vampnet_jax.evaluation.excerpts import Excerpt, choose_excerpts
from vampnet_jax.evaluation.measuring import BATCH, MEASURES, Bench, measure
from vampnet_jax.evaluation.report import write_report
from vampnet_jax.evaluation.summary import Result, summarise, summarise_tokens

SETTINGS = "settings.json"


def evaluate(
    compressor: Compressor,
    audio: Path,
    folder: Path,
    conditions: list[Condition],
    *,
    n_excerpts: int = 100,
    seconds: float = 10.0,
    embeddings: tuple[str, ...] = ("mel-statistics",),
    seed: int = 0,
    n_listen: int = 2,
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> list[Result]:
    """Evaluate a model on recordings.

    Of twice as many excerpts, none of which overlap, every other one is evaluated; those between
    are the reference of distances between sets, which therefore compare different music.

    Args:
      compressor: the model, with its table of frequencies if it has one.
      audio: folder of recordings that the model has not learnt from.
      folder: for results; what an interrupted run measured there is used again.
      conditions: as `conditions.baselines` and `paper_experiments` return; more may be added later.
      n_excerpts, seconds: how many, and how long each is.
      embeddings: names of `embeddings.EMBEDDINGS`.
      seed: of everything that is drawn.
      n_listen: recordings of each condition that are kept to listen to.
      on_progress: called with a condition's name, batches done and batches in all.

    Raises:
      InputError: no audio or too little, options that do not fit the model or the excerpts, or
        `folder` holds an evaluation of something else.
    """
    conditions = list({condition.slug: condition for condition in conditions}.values())
    for condition in conditions:  # what does not work must not fail after hours
        condition.check(compressor.model, seconds)
    excerpts = choose_excerpts(audio, 2 * n_excerpts, seconds)
    for name in embeddings:
        check_installed(name)
    settings = {
        "measures": MEASURES,
        "model": compressor.model.name,
        "weights": compressor.identity.hex(),
        "codec": compressor.model.codec.fingerprint,
        "sampling": {
            "coarse": dataclasses.asdict(compressor.model.coarse_sampling),
            "fine": dataclasses.asdict(compressor.model.fine_sampling),
        },
        "excerpts": n_excerpts,
        "seconds": seconds,
        "recordings": _digest(audio, excerpts),
        "embeddings": list(embeddings),
        "seed": seed,
        "listen": n_listen,
        "batch": BATCH,
    }
    _claim(folder, settings)
    bench = Bench(
        compressor, conditions, excerpts[::2], excerpts[1::2], embeddings, seed, folder, n_listen
    )
    measured = measure(bench, on_progress)
    results = summarise(conditions, measured, embeddings)
    tokens = summarise_tokens(measured.tokens)
    write_report(folder, results, tokens, settings, min(n_listen, n_excerpts))
    return results


def _digest(audio: Path, excerpts: list[Excerpt]) -> str:
    """Tells whether the excerpts are of the same files, by names and sizes."""
    lines = [
        f"{e.path.relative_to(audio).as_posix()} {e.path.stat().st_size} {e.start}"
        for e in excerpts
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Note in the folder what is evaluated there, or find that it is the same."""
    path = folder / SETTINGS
    settings = json.loads(json.dumps(settings))  # which has lists where there were tuples
    if not path.exists():
        if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise InputError(f"{folder} is not empty and holds no evaluation; choose another.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder} cannot be made: {error.strerror}.") from None
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(settings, indent=1) + "\n")
        return
    try:
        there = json.loads(path.read_text())
    except (OSError, ValueError):
        raise InputError(f"{path} cannot be read; choose another folder.") from None
    there = there if isinstance(there, dict) else {}
    differing = [name for name in settings if there.get(name) != settings[name]]
    if differing:
        raise InputError(
            f"{folder} holds an evaluation with other {' and '.join(differing)}; give those "
            "again to continue it, or choose another folder."
        )
