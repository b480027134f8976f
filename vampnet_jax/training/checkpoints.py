"""Checkpoints of a run, and the weights to take from it.

RUN/config.json            every setting of the run, its codec and its data
RUN/checkpoints/<step>/    Orbax; a checkpoint is complete or not there at all
RUN/damaged/<step>/        checkpoints that could not be read when the run continued
RUN/log.jsonl              one line of metrics per report
RUN/tensorboard/           the same for TensorBoard
"""

import gc
import json
import math
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    BestN,
    EveryNSteps,
    LatestN,
    PreservationPolicy,
)

from codec_bridge.atomic import atomic_write
from codec_bridge.errors import InputError
from vampnet_jax import lora
from vampnet_jax.config import ModelConfig
from vampnet_jax.model import Params, to_device
from vampnet_jax.training.config import TrainConfig
from vampnet_jax.training.faults import brief
from vampnet_jax.training.step import TrainState, abstract_state, with_codebooks

FORMAT_VERSION = 1
CONFIG = "config.json"
LOSS = "validation/log_loss"
MESSAGE_BYTES = 300
"""Of what went wrong in a process, as the others hear it."""


def write_run(run: Path, config: TrainConfig, facts: Mapping[str, Any]) -> None:
    """Write `config.json`: the settings, and facts about codec, data and versions."""
    content = {"format_version": FORMAT_VERSION, "training": config.to_dict(), **facts}
    with atomic_write(run / CONFIG) as path:
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_run(run: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """Settings and facts of a run.

    Raises:
      InputError: the folder is no run, or one that this version cannot read.
    """
    path = run / CONFIG
    if not path.is_file():
        raise InputError(f"{run} is no training run: it has no {CONFIG}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.pop("format_version")
        training = content.pop("training")
    except (ValueError, KeyError, AttributeError, OSError) as error:
        raise InputError(f"{path} is damaged ({error!r}).") from error
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path} has format version {version}; this version of vampnet reads {FORMAT_VERSION}."
        )
    return TrainConfig.from_dict(training), content


class Restored(NamedTuple):
    """What a run continues from."""

    state: TrainState
    """`frozen` is empty: it is never saved."""
    seconds: float
    """Training time so far."""
    damaged: dict[int, str]
    """Newer checkpoints that could not be read, and why; they were moved to RUN/damaged."""


class Checkpoints:
    """The checkpoints of a run.

    Kept are the newest `keep`, the one of lowest validation loss, and every step that is a
    multiple of `milestone_every`. Saving copies the state to the host and returns; files are
    written meanwhile. A checkpoint gets its name when it is complete. With several processes all
    must call `save`, `restore` and `close`, and all must see the same folder; a process that only
    reads (`read_only`) needs no others.

    Args:
      run: the run's folder.
      keep: how many of the newest.
      milestone_every: in steps; None keeps no milestones.
      read_only: leave the folder as it is, since another process may be writing to it.
    """

    def __init__(
        self,
        run: Path,
        keep: int,
        milestone_every: int | None = None,
        *,
        read_only: bool = False,
    ) -> None:
        def goodness(metrics: Mapping[str, float]) -> float:
            return -metrics[LOSS]

        policies: list[PreservationPolicy] = [
            LatestN(n=keep),
            BestN(get_metric_fn=goodness, n=1, keep_checkpoints_without_metrics=False),
        ]
        if milestone_every:
            policies.append(EveryNSteps(milestone_every))
        # A warning for each save without a loss; tracebacks of errors that are raised here as well.
        absl.logging.set_verbosity(absl.logging.FATAL)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(policies),
            best_fn=goodness,  # without it Orbax does not write the metrics down
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
        )
        self._run = run
        self._folder = (run / "checkpoints").absolute()
        self._manager = (
            _reader(self._folder)
            if read_only
            else ocp.CheckpointManager(self._folder, options=options)
        )

    @property
    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def by_loss(self) -> list[int]:
        """Steps from the lowest validation loss to the highest; later ones first if not scored."""
        return sorted(self.steps, key=lambda step: (self._loss(step), -step))

    def _loss(self, step: int) -> float:
        try:
            metrics = json.loads((self._folder / str(step) / "metrics" / "metrics").read_text())
            return float(metrics[LOSS])
        except (OSError, ValueError, KeyError, TypeError):  # not scored, or damaged
            return math.inf

    def save(
        self, step: int, state: TrainState, seconds: float, metrics: Mapping[str, float] | None
    ) -> None:
        """Begin to save; waits for the save before.

        Args:
          step: that of the state.
          state: its buffers may be donated as soon as this returns.
          seconds: the training time so far.
          metrics: of validation, if just measured.

        Raises:
          OSError or ValueError: this save or the one before could not be written.
        """
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(_saved_part(state)),
                progress=ocp.args.JsonSave({"seconds": seconds}),
            ),
            metrics=dict(metrics) if metrics else None,
            force=True,
        )

    def check(self) -> None:
        """Raise the error of a save in the background, if it has failed."""
        self._manager.check_for_errors()

    def wait(self) -> None:
        """Wait until what was saved is complete on disk."""
        self._manager.wait_until_finished()

    def restore(self, config: TrainConfig, shardings: TrainState | None = None) -> Restored | None:
        """The newest state that every process can read; None if there is no checkpoint.

        Args:
          config: of the run.
          shardings: where each array goes, a tree like the state's; any mesh of any size, whatever
            the run was saved on. None: everything on the first device.

        Raises:
          InputError: there are checkpoints and none can be read.
        """
        wanted = _abstract_state(config, shardings)
        problems: dict[int, str] = {}
        reader = _reader(self._folder)
        untried = sorted(reader.all_steps())
        # One step after the other, the newest that any process sees, and read by all of them.
        while (step := _largest(untried[-1] if untried else -1)) >= 0:
            untried = [other for other in untried if other < step]
            restored, problem = None, None
            try:
                restored = _read(reader, step, wanted)
            except Exception as error:  # Orbax and TensorStore raise many kinds
                problem = f"{type(error).__name__}: {brief(error)}"
            if problem is not None:
                _forget_unfinished_reads()
            problem = _of_any_process(problem)
            if problem is None:
                assert restored is not None
                reader.close()
                self._set_aside(list(problems))
                return Restored(*restored, problems)
            problems[step] = problem
        reader.close()
        if problems:
            newest = max(problems)
            raise InputError(
                f"No checkpoint in {self._folder} can be read (step {newest}: {problems[newest]}); "
                "nothing was changed. Restore the folder from a copy, or train anew in another one."
            )
        return None

    def _set_aside(self, steps: list[int]) -> None:
        """Move damaged checkpoints away, so that their steps can be saved again."""
        if not steps:
            return
        problem = None
        try:
            for step in steps if jax.process_index() == 0 else []:
                target = self._run / "damaged" / str(step)
                target.parent.mkdir(exist_ok=True)
                while target.exists():
                    target = target.with_name(f"{target.name}-again")
                (self._folder / str(step)).rename(target)
        except OSError as error:
            problem = str(error)
        problem = _of_any_process(problem)  # so that all go on after the folders have moved
        if problem is not None:
            raise InputError(
                f"Damaged checkpoints of {self._run} could not be moved to "
                f"{self._run / 'damaged'} ({problem}); move them yourself, then run the same "
                "command again."
            )
        self._manager.reload()

    def read_params(self, config: TrainConfig, step: int) -> Params:
        """The weights to use: the moving average where one is kept; adapters for a LoRA run.

        They are NumPy arrays, in the host's memory.
        """
        wanted = abstract_state(config)._asdict()
        kept = "ema" if config.ema_decay else "params"
        part = {kept: wanted[kept], "codebooks": wanted["codebooks"]}
        arguments = ocp.args.PyTreeRestore(
            part,
            restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), part),
            partial_restore=True,
        )
        restored = self._manager.restore(step, args=ocp.args.Composite(state=arguments))["state"]
        if config.lora is not None:
            return restored[kept]
        return with_codebooks(restored[kept], restored["codebooks"])

    def close(self) -> None:
        """Wait for what is being written; then release the threads."""
        self._manager.close()


def load_run(run_dir: str | Path, *, step: int | None = None) -> tuple[Params, ModelConfig]:
    """The weights of a training run, for sampling; the run may be under way.

    Args:
      run_dir: the folder that `vampnet train --out` wrote.
      step: which checkpoint; None takes the one of lowest validation loss, or the newest if none
        was validated.

    Returns:
      Parameters as `vampnet_jax.apply` takes them (the moving average where the run keeps one)
      and the model's configuration. The adapters of a LoRA run are merged into the model that it
      adapts.

    Raises:
      InputError: no run, no checkpoint that can be read, or no such step; or the model that a LoRA
        run adapts is not where it was.
    """
    params, model = read_weights(run_dir, step=step)
    return to_device(params), model


def read_weights(run_dir: str | Path, *, step: int | None = None) -> tuple[Params, ModelConfig]:
    """As `load_run`, but the parameters are NumPy arrays in the host's memory."""
    config, facts, params = _read_trained(Path(run_dir), step)
    if config.lora is None:
        return params, config.model
    from vampnet_jax.training.initial import load_adapted

    return lora.merge_on_host(load_adapted(facts), params, config.lora), config.model


def load_adapters(
    run_dir: str | Path, *, step: int | None = None
) -> tuple[lora.Adapters, lora.LoraConfig]:
    """The adapters of a LoRA run, as `vampnet_jax.lora.attach` and `merge` take them.

    Args:
      run_dir, step: as for `load_run`.

    Raises:
      InputError: as `load_run`, or the run trains no adapters.
    """
    config, _, adapters = _read_trained(Path(run_dir), step)
    if config.lora is None:
        raise InputError(f"{run_dir} trains a whole model, no LoRA adapters; use `vampnet import`.")
    return to_device(adapters), config.lora


def _read_trained(run: Path, step: int | None) -> tuple[TrainConfig, dict[str, Any], Params]:
    """Settings, facts, and what was trained, as NumPy arrays."""
    config, facts = read_run(run)
    if not (run / "checkpoints").is_dir():
        raise InputError(f"{run} has no checkpoint yet; train for longer.")
    checkpoints = Checkpoints(run, config.keep, read_only=True)
    steps = checkpoints.steps
    if not steps:
        raise InputError(f"{run} has no checkpoint yet; train for longer.")
    if step is not None and step not in steps:
        raise InputError(f"{run} has no checkpoint of step {step}; it has {steps}.")
    try:
        for chosen in checkpoints.by_loss() if step is None else [step]:
            try:
                return config, facts, checkpoints.read_params(config, chosen)
            except Exception as error:  # Orbax and TensorStore raise many kinds
                warnings.warn(f"{run}: checkpoint {chosen} cannot be read ({error})", stacklevel=2)
            _forget_unfinished_reads()
        which = "No checkpoint" if step is None else f"Checkpoint {step}"
        raise InputError(f"{which} of {run} can be read; train on, or restore it from a copy.")
    finally:
        checkpoints.close()


def _reader(folder: Path) -> ocp.CheckpointManager:
    """Reads checkpoints and changes nothing; waits for no other process, whatever it meets."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    options = ocp.CheckpointManagerOptions(
        read_only=True,
        create=False,
        cleanup_tmp_directories=False,
        enable_async_checkpointing=False,
        multiprocessing_options=alone,
    )
    return ocp.CheckpointManager(folder, options=options)


def _read(reader: ocp.CheckpointManager, step: int, wanted: TrainState) -> tuple[TrainState, float]:
    """State and training time of a checkpoint; of arrays this process's part."""
    part = _saved_part(wanted)
    arguments = ocp.args.PyTreeRestore(
        part,
        restore_args=ocp.checkpoint_utils.construct_restore_args(part),
        partial_restore=True,
    )
    restored = reader.restore(
        step, args=ocp.args.Composite(state=arguments, progress=ocp.args.JsonRestore())
    )
    return wanted._replace(**restored["state"]), float(restored["progress"]["seconds"])


def _forget_unfinished_reads() -> None:
    """Collect the reads that a failed one left unfinished, without what they print then.

    Orbax reads all arrays at once; each that never finished would print a page when Python
    collects it.
    """
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        gc.collect()
    finally:
        sys.unraisablehook = hook


def _largest(number: int) -> int:
    """The largest of the numbers that the processes give; all must call this."""
    return int(np.max(multihost_utils.process_allgather(np.int32(number))))


def _of_any_process(problem: str | None) -> str | None:
    """The first problem that a process gives, None if none has one; all must call this."""
    if jax.process_count() == 1:
        return problem
    text = np.zeros(MESSAGE_BYTES, np.uint8)
    mine = np.frombuffer((problem or "").encode()[:MESSAGE_BYTES], np.uint8)
    text[: len(mine)] = mine
    for number, row in enumerate(multihost_utils.process_allgather(text)):
        if row.any():
            return f"process {number}: {bytes(row).rstrip(bytes(1)).decode(errors='replace')}"
    return None


def _saved_part(state: TrainState) -> dict[str, Any]:
    """The fields that a checkpoint holds: what a step changes, and the codebooks."""
    fields = {name: value for name, value in state._asdict().items() if name != "frozen"}
    return {name: value for name, value in fields.items() if jax.tree.leaves(value)}


def _abstract_state(config: TrainConfig, shardings: TrainState | None) -> TrainState:
    """Shapes and places of the state."""
    state = abstract_state(config)._replace(frozen={})
    if shardings is None:
        one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: one, state)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        shardings._replace(frozen=state.frozen),
    )
