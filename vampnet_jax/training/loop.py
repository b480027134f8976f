"""A training run from tokens to checkpoints."""

import collections
import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console

from codec_bridge.errors import InputError
from vampnet_jax.model import Params
from vampnet_jax.training import flops
from vampnet_jax.training.checkpoints import Checkpoints
from vampnet_jax.training.config import TrainConfig
from vampnet_jax.training.distributed import settle
from vampnet_jax.training.excerpts import (
    RandomExcerpts,
    check_weights,
    choose_tracks,
    long_enough,
)
from vampnet_jax.training.faults import Ending, StopRequests, reading, stop_requests, writing
from vampnet_jax.training.frequencies import kept_frequencies
from vampnet_jax.training.listening import Listening, on_one_device
from vampnet_jax.training.log import RunLog
from vampnet_jax.training.meter import Meter
from vampnet_jax.training.sharding import Layout, place
from vampnet_jax.training.step import (
    TrainState,
    abstract_state,
    freeze,
    init_on,
    jitted_step,
    model_params,
    without_codebooks,
)
from vampnet_jax.training.tokens import Manifest, TrackReader, read_codebooks, read_manifest
from vampnet_jax.training.validation import Validation

SKIPS_IN_A_ROW = 50
"""After so many steps that changed nothing (`skip_spikes`) the run is lost."""


class TrainingData(NamedTuple):
    """The token folder that a run reads."""

    folder: Path
    manifest: Manifest
    codebooks: np.ndarray
    """float32 `[C, V, d]`."""
    window: int
    """Frames per excerpt."""
    train: TrackReader
    validation: TrackReader | None
    """None where no validation track is as long as a window."""
    left_out: tuple[str, ...]
    """What is not used of the folder, and why, in a few words each."""


def open_data(config: TrainConfig, folder: Path) -> TrainingData:
    """Open a token folder and check that a run with this configuration can use it.

    Raises:
      InputError: unusable or damaged tokens, or none as long as a window.
    """
    manifest = read_manifest(folder)
    codebooks = read_codebooks(folder, manifest.codec)
    window = manifest.codec.frames(config.window_seconds)
    for_training, for_validation = (
        choose_tracks(manifest, split) for split in ("train", "validation")
    )
    undecided = [track for track in manifest.tracks if track.split is None]
    if undecided and len(undecided) == len(manifest.tracks):
        undecided = []  # a folder without splits, which is divided by names
    if not for_training:
        raise InputError(
            f"No track in {folder} has the split train ({len(undecided)} have none); tokenise with "
            "--split train or --split-file."
        )
    tracks, too_short = long_enough(for_training, window, "training")
    check_weights(dict(config.source_weights), tracks, {t.source for t in for_training})
    held_out = [track for track in for_validation if track.frames >= window]
    numbers = {
        f"training tracks shorter than {window} frames": too_short,
        f"validation tracks shorter than {window} frames": len(for_validation) - len(held_out),
        "tracks without a split, in a folder that has splits": len(undecided),
    }
    return TrainingData(
        folder=folder,
        manifest=manifest,
        codebooks=codebooks,
        window=window,
        train=TrackReader(folder, manifest, tracks),
        validation=TrackReader(folder, manifest, held_out) if held_out else None,
        left_out=tuple(f"{number} {what}" for what, number in numbers.items() if number),
    )


def train(
    config: TrainConfig,
    data: TrainingData,
    run: Path,
    console: Console,
    layout: Layout,
    *,
    initial: Callable[[], Params] | None = None,
    listening: Listening | None = None,
) -> Ending:
    """Train until the steps or minutes of the configuration are used up.

    Continues from the newest checkpoint in `run` that can be read, if there is one: with the same
    data and randomness as if it had never stopped.

    Args:
      config: all settings.
      data: tokens of the codec that the configuration fits.
      run: an existing folder; checkpoints and logs go there.
      console: where progress is shown.
      layout: which devices compute, and what each holds; it may be another one than before.
      initial: loads weights to begin with, as `vampnet_jax.apply` takes them but in the host's
        memory, if there is no checkpoint yet; None begins at random. A LoRA run needs it always: it
        loads the model that is adapted.
      listening: makes sounds where the configuration asks for them; needed in process 0 only.

    Returns:
      Whether training finished or was asked to stop; in every case its state is saved.

    Raises:
      InputError: damaged or vanished data, another codec than before, a folder that cannot be
        written to, or a loss that is not finite.
    """
    # --- data
    model, window = config.model, data.window
    excerpts = RandomExcerpts(
        data.train,
        model.n_codebooks,
        window,
        config.min_loudness,
        config.seed,
        dict(config.source_weights),
    )
    part, parts = layout.share(config.batch_size)
    batches = excerpts.batches(config.batch_size, process_index=part, process_count=parts)
    validation = None
    if data.validation:
        validation = Validation(
            data.validation, model, window, config.validation_excerpts, config.batch_size, layout
        )

    # --- state
    with reading(data.folder):
        frequencies, counted_anew = kept_frequencies(run, data.train)
    checkpoints = Checkpoints(run, config.keep, config.milestone_every)
    restored = checkpoints.restore(config, layout.shardings(abstract_state(config)))
    if restored is None:
        state = init_on(layout, config, data.codebooks, frequencies)
        if initial is not None and config.lora is None:
            state = with_weights(state, initial())
        seconds_before = 0.0
    else:
        state, seconds_before = restored.state, restored.seconds
        if not np.array_equal(state.codebooks, data.codebooks[: model.n_codebooks]):
            raise InputError(f"{run} was trained with another codec than these tokens.")
        if counted_anew:
            console.print(
                "note: the training tracks are not those that this run had before; from here on it "
                "draws other excerpts",
                soft_wrap=True,
            )
        for step, problem in restored.damaged.items():
            console.print(
                f"warning: checkpoint {step} is damaged ({problem}) and was moved to "
                f"{run / 'damaged'}; an older one is used",
                soft_wrap=True,
                markup=False,
            )

    if config.lora is not None:
        assert initial is not None
        state = with_frozen(state, initial(), config, layout)

    # --- loop
    peak = flops.peak(config, layout.mesh.size)
    _announce(config, state, data, peak, console)
    step_now = int(state.step)
    batches.set_state({"next_index": step_now})
    tokens_per_step = config.batch_size * model.n_codebooks * window
    meter = Meter(tokens_per_step, flops.step_flops(config, window), peak.flops)
    quiet = jax.process_index() != 0
    with RunLog(run, console, step_now, quiet=quiet) as log, stop_requests() as wanted:
        log.write_text("configuration", f"```json\n{json.dumps(config.to_dict(), indent=1)}\n```")
        trainer = _Loop(config, data, run, state, layout, seconds_before, checkpoints, log, meter)
        trainer.validation, trainer.listening = validation, listening
        if validation:
            unigram = validation.score_unigram(frequencies)
            log.write(trainer.step, {f"unigram/{k}": v for k, v in unigram.items()})
            log.say(f"to beat: {unigram['log_loss']:.3f} nats, from token frequencies alone")
        try:
            ending = trainer.run_until_done(batches, wanted)
            with writing(run):
                checkpoints.wait()
        except BaseException:
            with contextlib.suppress(Exception):  # of a save that failed; it was reported
                checkpoints.close()
            raise
        checkpoints.close()
    return ending


def with_weights(state: TrainState, params: Params) -> TrainState:
    """A state before the first step that begins with given weights, in the host's memory."""
    places = jax.tree.map(lambda x: x.sharding, state.params)
    chosen = place(without_codebooks(params), places)
    return state._replace(params=chosen, ema=jax.tree.map(jnp.copy, chosen) if state.ema else {})


def with_frozen(
    state: TrainState, params: Params, config: TrainConfig, layout: Layout
) -> TrainState:
    """A state of a LoRA run with the parameters that are adapted, divided over the mesh.

    Args:
      params: as `vampnet_jax.apply` takes them, in the host's memory.
    """
    places = layout.shardings(abstract_state(config)).frozen
    return state._replace(frozen=place(freeze(params, config), places))


def _announce(
    config: TrainConfig, state: TrainState, data: TrainingData, peak: flops.Peak, console: Console
) -> None:
    """Say what is trained on what."""
    n_params = sum(x.size for x in jax.tree.leaves(state.params))
    hours = sum(track.seconds for track in data.train.tracks) / 3600
    held_out = len(data.validation.tracks) if data.validation else 0
    what = "parameters"
    if config.lora is not None:
        n_frozen = sum(x.size for x in jax.tree.leaves(state.frozen))
        what = f"parameters in adapters of a model of {n_frozen / 1e6:.1f} M"
    console.print(
        f"{n_params / 1e6:.1f} M {what}; {len(data.train.tracks)} training tracks, {hours:.1f} "
        f"h; {held_out} validation tracks; seed {config.seed}; from step {int(state.step)}",
        soft_wrap=True,
    )
    console.print(f"MFU is the share of {peak.source}", soft_wrap=True)
    for what in data.left_out:
        console.print(f"{what}: left out", soft_wrap=True)
    if not data.validation:
        console.print("no validation track is as long as a window: the loss will not be validated")
        if config.listen_every:
            console.print("nor will anything be heard (--listen-every)")


class _Loop:
    """Steps, and between them logs, validations and checkpoints.

    A step is started before the metrics of the one before are read, so that devices never wait
    for the host; all metrics are read before a state is saved, so that no bad state ever is.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: TrainingData,
        run: Path,
        state: TrainState,
        layout: Layout,
        seconds_before: float,
        checkpoints: Checkpoints,
        log: RunLog,
        meter: Meter,
    ) -> None:
        self.config = config
        self.data = data
        self.run = run
        self.state = state
        self.step = int(state.step)
        self.validation: Validation | None = None
        self.listening: Listening | None = None
        self.checkpoints = checkpoints
        self.log = log
        self.meter = meter
        self.clock = _Clock(seconds_before)
        self.saved_seconds, self.saved_step = seconds_before, self.step
        self.unread: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()
        self.skipped_in_a_row = 0
        self.layout = layout
        self.take_step = jitted_step(config, layout)

    def run_until_done(self, batches: Iterator[np.ndarray], wanted: StopRequests) -> Ending:
        config = self.config
        listens = config.listen_every
        first = self.step + 1
        done = config.done(self.step, self.clock.seconds)
        while done < 1:
            ending = wanted(self.step)
            if ending is not None:
                self.save()
                self.log.say(f"stopped after step {self.step}; the same command continues")
                return ending
            rows = self.next_batch(batches)
            tokens = self.layout.place_batch(rows, config.batch_size)
            self.state, metrics = self.take_step(self.state, tokens, np.float32(done))
            self.step += 1
            if self.step == first:
                self.meter.restart()  # it has been compiled, which is no part of any rate
            self.unread.append((self.step, metrics))
            self.read_metrics(behind=1)
            if self.step % config.log_every == 0:
                settle(self.state)
                self.clock.agree()
            done = config.done(self.step, self.clock.seconds)
            if self.step % config.validate_every == 0 or done >= 1:
                self.validate_and_save()
            elif self.save_is_due():
                self.save()
            if self.data.validation and listens and self.step % listens == 0:
                self.listen()
        self.log.say(f"finished after step {self.step}, {self.clock.seconds / 60:.1f} minutes")
        return Ending.FINISHED

    def next_batch(self, batches: Iterator[np.ndarray]) -> np.ndarray:
        try:
            with self.meter.waiting("data"), reading(self.data.folder):
                return next(batches)
        except InputError:
            if jax.process_count() == 1:  # the others do not know
                self.save()
            raise

    def read_metrics(self, *, behind: int) -> None:
        """Read the metrics of all steps but the newest `behind`; waits for those steps."""
        if not behind:
            settle(self.state)
        while len(self.unread) > behind:
            step, metrics = self.unread.popleft()
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            self.check_finite(step, values)
            self.meter.add({n: v if math.isfinite(v) else math.nan for n, v in values.items()})
            if step % self.config.log_every == 0:
                averages = self.meter.report()
                self.log.write(step, {f"train/{k}": v for k, v in averages.items()})
                self.log.show(step, averages, self.config.done(step, self.clock.seconds))
                with writing(self.run):
                    self.checkpoints.check()

    def check_finite(self, step: int, values: dict[str, float]) -> None:
        if values.get("skipped"):
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row < SKIPS_IN_A_ROW:
                return
            problem = f"The last {SKIPS_IN_A_ROW} steps up to {step} were all skipped as spikes"
        else:
            self.skipped_in_a_row = 0
            needed = ("loss", "gradient_norm", "parameter_norm")
            if all(math.isfinite(values[name]) for name in needed):
                return
            problem = f"The loss or its gradient is not a finite number at step {step}"
        kept = self.checkpoints.steps
        last = f"the last good state is step {kept[-1]}" if kept else "nothing was saved yet"
        advice = f"a learning rate below {self.config.learning_rate:g} and another --out"
        if kept:
            advice += f", perhaps from there: --init-from {self.run}"
        raise InputError(f"{problem}; {last}. Train with {advice}.")

    def validate_and_save(self) -> None:
        if self.validation is None:
            self.save()
            return
        self.read_metrics(behind=0)
        with self.meter.paused():
            scores = self.validation.score(model_params(self.state, self.config))
        scores = {f"validation/{name}": value for name, value in scores.items()}
        self.log.write(self.step, scores)
        by_source = "  ".join(
            f"{name.rsplit('/', 1)[1]} {value:.3f}"
            for name, value in scores.items()
            if name.startswith("validation/log_loss/")
        )
        loss = scores["validation/log_loss"]
        self.log.say(f"step {self.step}  validation {loss:.4f}  {by_source}")
        self.save(scores)

    def listen(self) -> None:
        self.read_metrics(behind=0)
        with self.meter.paused():
            params = on_one_device(model_params(self.state, self.config))
            if self.listening is not None:
                self.listening.listen(self.step, params, self.log)

    def save_is_due(self) -> bool:
        config = self.config
        every = (config.save_every, config.milestone_every)
        if any(steps and self.step % steps == 0 for steps in every):
            return True
        return self.clock.seconds - self.saved_seconds > 60 * config.save_minutes

    def save(self, scores: dict[str, float] | None = None) -> None:
        if self.saved_step == self.step:
            return
        self.read_metrics(behind=0)
        with self.meter.waiting("checkpoints"), writing(self.run):
            self.checkpoints.save(self.step, self.state, self.clock.seconds, scores)
        self.saved_seconds, self.saved_step = self.clock.seconds, self.step


class _Clock:
    """Training time of the run so far, the same in all processes: what hangs on it must agree."""

    def __init__(self, seconds_before: float) -> None:
        self._started = time.monotonic() - seconds_before
        self._agreed = seconds_before
        self._several = jax.process_count() > 1

    @property
    def seconds(self) -> float:
        """With several processes the time of process 0 when they last agreed."""
        return self._agreed if self._several else time.monotonic() - self._started

    def agree(self) -> None:
        """Take over the time of process 0; all processes must call this after the same step."""
        if self._several:
            now = np.float32(time.monotonic() - self._started)
            self._agreed = float(multihost_utils.broadcast_one_to_all(now))
