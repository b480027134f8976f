"""Checkpoints of a run, and the weights to take from it.

RUN/config.json            every setting of the run, its codec and its data
RUN/checkpoints/<step>/    Orbax; a checkpoint is complete or not there at all
RUN/log.jsonl              one line of metrics per report
RUN/tensorboard/           the same for TensorBoard
"""

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import absl.logging
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from codec_bridge.atomic import atomic_write
from codec_bridge.errors import InputError
from vampnet_jax.config import ModelConfig
from vampnet_jax.model import Params
from vampnet_jax.training.config import TrainConfig
from vampnet_jax.training.step import TrainState, init_state, with_codebooks

FORMAT_VERSION = 1
CONFIG = "config.json"
LOSS = "validation/log_loss"


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


class Checkpoints:
    """The checkpoints of a run: the newest `keep` and the one with the best validation loss."""

    def __init__(self, run: Path, keep: int) -> None:
        def goodness(metrics: Mapping[str, float]) -> float:
            return -metrics[LOSS]

        policies = [
            LatestN(n=keep),
            BestN(get_metric_fn=goodness, n=1, keep_checkpoints_without_metrics=False),
        ]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(policies),
            best_fn=goodness,  # without it Orbax does not write the metrics down
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,
        )
        absl.logging.set_verbosity(absl.logging.ERROR)  # a warning for each save without a loss
        self._manager = ocp.CheckpointManager((run / "checkpoints").absolute(), options=options)

    @property
    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def best(self) -> int | None:
        """The step of lowest validation loss; the newest if none was validated."""
        losses = {step: self._loss(step) for step in self.steps}
        return min(losses, key=lambda step: (losses[step], -step), default=None)

    def _loss(self, step: int) -> float:
        return (self._manager.metrics(step) or {}).get(LOSS, math.inf)

    def save(self, state: TrainState, seconds: float, metrics: Mapping[str, float] | None) -> None:
        """Save, with the training time so far and the validation metrics if just measured."""
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(state), progress=ocp.args.JsonSave({"seconds": seconds})
            ),
            metrics=dict(metrics) if metrics else None,
            force=True,
        )

    def restore(self, config: TrainConfig) -> tuple[TrainState, float] | None:
        """The newest state and the training time so far; None if there is no checkpoint."""
        if not self.steps:
            return None
        state = _abstract_state(config)
        arguments = ocp.args.PyTreeRestore(
            state, restore_args=ocp.checkpoint_utils.construct_restore_args(state)
        )
        restored = self._manager.restore(
            self.steps[-1],
            args=ocp.args.Composite(state=arguments, progress=ocp.args.JsonRestore()),
        )
        return restored["state"], float(restored["progress"]["seconds"])

    def restore_params(self, config: TrainConfig, step: int) -> Params:
        """The weights to use: the moving average where one is kept."""
        state = _abstract_state(config)
        kept = "ema" if config.ema_decay else "params"
        wanted = {kept: getattr(state, kept), "codebooks": state.codebooks}
        arguments = ocp.args.PyTreeRestore(
            wanted,
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=True,
        )
        restored = self._manager.restore(step, args=ocp.args.Composite(state=arguments))["state"]
        return with_codebooks(restored[kept], restored["codebooks"])

    def close(self) -> None:
        """Wait for what is being written."""
        self._manager.close()


def load_run(run_dir: str | Path, *, step: int | None = None) -> tuple[Params, ModelConfig]:
    """The weights of a training run, for sampling.

    Args:
      run_dir: the folder that `vampnet train --out` wrote.
      step: which checkpoint; None takes the one of lowest validation loss, or the newest if none
        was validated.

    Returns:
      Parameters as `vampnet_jax.apply` takes them (the moving average where the run keeps one)
      and the model's configuration.

    Raises:
      InputError: no run, no checkpoint, or no such step.
    """
    run = Path(run_dir)
    config, _ = read_run(run)
    checkpoints = Checkpoints(run, config.keep)
    steps = checkpoints.steps
    if not steps:
        raise InputError(f"{run} has no checkpoint yet; train for longer.")
    if step is not None and step not in steps:
        raise InputError(f"{run} has no checkpoint of step {step}; it has {steps}.")
    chosen = checkpoints.best() if step is None else step
    assert chosen is not None
    try:
        return checkpoints.restore_params(config, chosen), config.model
    finally:
        checkpoints.close()


def _abstract_state(config: TrainConfig) -> TrainState:
    """Shapes of the state, on one device."""
    model = config.model
    shape = (model.n_codebooks, model.vocab_size, model.latent_dim)
    codebooks = jax.ShapeDtypeStruct(shape, jnp.float32)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(functools.partial(init_state, config), codebooks),
    )
