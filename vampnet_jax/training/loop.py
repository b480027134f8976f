"""A training run from tokens to checkpoints."""

import collections
import functools
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from codec_bridge.errors import InputError
from vampnet_jax.training.checkpoints import Checkpoints
from vampnet_jax.training.config import TrainConfig
from vampnet_jax.training.excerpts import RandomExcerpts, choose_tracks, long_enough
from vampnet_jax.training.log import RunLog
from vampnet_jax.training.step import TrainState, init_state, model_params, train_step
from vampnet_jax.training.tokens import Manifest, TrackReader, read_codebooks, read_manifest
from vampnet_jax.training.validation import Validation, token_frequencies

Totals = dict[str, list[float]]


class TrainingData(NamedTuple):
    """The token folder that a run reads."""

    manifest: Manifest
    codebooks: np.ndarray
    """float32 `[C, V, d]`."""
    window: int
    """Frames per excerpt."""
    train: TrackReader
    validation: TrackReader | None
    """None where no validation track is as long as a window."""
    too_short: int
    """Training tracks that are left out because they are shorter than a window."""


def open_data(config: TrainConfig, folder: Path) -> TrainingData:
    """Open a token folder and check that a run with this configuration can use it.

    Raises:
      InputError: unusable or damaged tokens, or none as long as a window.
    """
    manifest = read_manifest(folder)
    codebooks = read_codebooks(folder, manifest.codec)
    window = manifest.codec.frames(config.window_seconds)
    tracks, too_short = long_enough(choose_tracks(manifest, "train"), window, "training")
    held_out = [t for t in choose_tracks(manifest, "validation") if t.frames >= window]
    return TrainingData(
        manifest=manifest,
        codebooks=codebooks,
        window=window,
        train=TrackReader(folder, manifest, tracks),
        validation=TrackReader(folder, manifest, held_out) if held_out else None,
        too_short=too_short,
    )


def train(config: TrainConfig, data: TrainingData, run: Path, console: Console) -> bool:
    """Train until the steps or minutes of the configuration are used up.

    Continues from the newest checkpoint in `run` if there is one: with the same data and
    randomness as if it had never stopped.

    Args:
      config: all settings.
      data: tokens of the codec that the configuration fits.
      run: an existing folder; checkpoints and logs go there.
      console: where progress is shown.

    Returns:
      Whether training finished; False if Ctrl-C or SIGTERM ended it, after saving.

    Raises:
      InputError: damaged data, another codec than before, or a loss that is not finite.
    """
    # --- data
    model, window = config.model, data.window
    excerpts = RandomExcerpts(
        data.train, model.n_codebooks, window, config.min_loudness, config.seed
    )
    batches = excerpts.batches(config.batch_size)
    validation = None
    if data.validation:
        validation = Validation(
            data.validation, model, window, config.validation_excerpts, config.batch_size
        )

    # --- state
    frequencies = token_frequencies(data.train)
    checkpoints = Checkpoints(run, config.keep)
    restored = checkpoints.restore(config)
    if restored is None:
        start = jax.jit(init_state, static_argnums=0)
        state = start(config, jnp.asarray(data.codebooks), jnp.asarray(frequencies, jnp.float32))
        seconds_before = 0.0
    else:
        state, seconds_before = restored
        if not np.array_equal(state.codebooks, data.codebooks[: model.n_codebooks]):
            raise InputError(f"{run} was trained with another codec than these tokens.")
    _announce(config, state, data, console)

    # --- loop
    trainer = _Loop(config, state, seconds_before, validation, checkpoints)
    batches.set_state({"next_index": int(state.step)})
    with RunLog(run, console, int(state.step)) as log, _stop_signals() as stop:
        if validation:
            unigram = validation.score_unigram(frequencies)
            log.write(trainer.step, {f"unigram/{k}": v for k, v in unigram.items()})
            log.say(f"to beat: {unigram['log_loss']:.3f} nats, from token frequencies alone")
        try:
            finished = trainer.run(batches, log, stop)
        finally:
            checkpoints.close()
    return finished


def _announce(config: TrainConfig, state: TrainState, data: TrainingData, console: Console) -> None:
    """Say what is trained on what."""
    n_params = sum(x.size for x in jax.tree.leaves(state.params))
    hours = sum(track.seconds for track in data.train.tracks) / 3600
    held_out = len(data.validation.tracks) if data.validation else 0
    console.print(
        f"{n_params / 1e6:.1f} M parameters; {len(data.train.tracks)} training tracks, {hours:.1f} "
        f"h; {held_out} validation tracks; seed {config.seed}; from step {int(state.step)}",
        soft_wrap=True,
    )
    if data.too_short:
        console.print(
            f"{data.too_short} training tracks shorter than {data.window} frames: left out"
        )
    if not data.validation:
        console.print("no validation track is as long as a window: the loss will not be validated")


class _Loop:
    """Steps, and between them logs, validations and checkpoints."""

    def __init__(
        self,
        config: TrainConfig,
        state: TrainState,
        seconds_before: float,
        validation: Validation | None,
        checkpoints: Checkpoints,
    ) -> None:
        self.config = config
        self.state = state
        self.step = int(state.step)
        self.validation = validation
        self.checkpoints = checkpoints
        self.started = time.monotonic() - seconds_before
        self.saved_at = time.monotonic()
        self.saved_step = self.step
        self.take_step = jax.jit(
            functools.partial(train_step, config=config), donate_argnames="state"
        )

    @property
    def seconds(self) -> float:
        """Training time of the run so far."""
        return time.monotonic() - self.started

    def run(self, batches: Iterator[np.ndarray], log: RunLog, stop: threading.Event) -> bool:
        config = self.config
        totals: Totals = collections.defaultdict(list)
        since, waited = time.monotonic(), 0.0
        while (done := config.done(self.step, self.seconds)) < 1:
            if stop.is_set():
                self.save(None)
                log.say(f"stopped after step {self.step}; continue with --resume")
                return False
            asked = time.monotonic()
            tokens = next(batches)
            waited += time.monotonic() - asked
            self.state, metrics = self.take_step(self.state, tokens, np.float32(done))
            self.step += 1
            self.collect(totals, metrics)
            if self.step % config.log_every == 0:
                elapsed = time.monotonic() - since
                averages = {name: _mean(values) for name, values in totals.items()}
                averages["steps/s"] = len(totals["loss"]) / elapsed
                averages["tokens/s"] = averages["steps/s"] * tokens.size
                averages["waiting for data"] = waited / elapsed
                log.write(self.step, {f"train/{k}": v for k, v in averages.items()})
                log.show(self.step, averages, done)
                totals.clear()
                since, waited = time.monotonic(), 0.0
            if self.step % config.validate_every == 0:
                before = time.monotonic()
                self.validate_and_save(log)
                since += time.monotonic() - before
            elif time.monotonic() - self.saved_at > 60 * config.save_minutes:
                self.save(None)
        if self.saved_step != self.step:
            self.validate_and_save(log)
        log.say(f"finished after step {self.step}, {self.seconds / 60:.1f} minutes")
        return True

    def collect(self, totals: Totals, metrics: dict[str, jax.Array]) -> None:
        """Add a step's metrics; this waits for the step."""
        values = {name: float(value) for name, value in metrics.items()}
        if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
            kept = self.checkpoints.steps
            last = f"the last good state is step {kept[-1]}" if kept else "nothing was saved yet"
            raise InputError(
                f"The loss or its gradient is not a finite number at step {self.step}; {last}. "
                f"Try a learning rate below {self.config.learning_rate:g}."
            )
        for name, value in values.items():
            totals[name].append(value)

    def validate_and_save(self, log: RunLog) -> None:
        if self.validation is None:
            self.save(None)
            return
        scores = self.validation.score(model_params(self.state, self.config))
        scores = {f"validation/{name}": value for name, value in scores.items()}
        log.write(self.step, scores)
        by_source = "  ".join(
            f"{name.rsplit('/', 1)[1]} {value:.3f}"
            for name, value in scores.items()
            if name.startswith("validation/log_loss/")
        )
        log.say(f"step {self.step}  validation {scores['validation/log_loss']:.4f}  {by_source}")
        self.save(scores)

    def save(self, scores: dict[str, float] | None) -> None:
        if self.saved_step == self.step:
            return
        self.checkpoints.save(self.state, self.seconds, scores)
        self.saved_at, self.saved_step = time.monotonic(), self.step


def _mean(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; the second Ctrl-C interrupts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def ask(number: int, frame: object) -> None:
        event.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
