"""Joining the other processes of a training job; on one machine there is nothing to do.

JAX runs the same program in every process of a job, one process a machine (TPU) or one an
accelerator (GPU), and each sees all devices. `connect` finds out who the others are.
"""

import glob
import importlib.util
import os
from collections.abc import Mapping
from typing import Any

import jax

from codec_bridge.errors import InputError

COORDINATOR, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
"""Environment variables that describe a job by hand: host:port of process 0, processes, number."""

_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


def connect() -> None:
    """Join this job's other processes; call it before JAX computes anything.

    Looks, in this order, for the three variables above, a Slurm step of several tasks (`srun`),
    an indexed Kubernetes Job, and TPU machines, whose hosts know each other. JAX_NUM_PROCESSES=1
    switches it off.

    Raises:
      InputError: a job is described in part or wrongly, or its other processes do not answer.
    """
    if jax.distributed.is_initialized():
        return
    arguments = job(os.environ, on_tpu=_on_tpu())
    if arguments is None:
        return
    try:
        jax.distributed.initialize(**arguments)
    except (RuntimeError, ValueError, ImportError, OSError) as error:
        raise InputError(
            "Cannot join the other processes of this job "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); set "
            f"{COORDINATOR}, {COUNT} and {NUMBER}, or {COUNT}=1 to train on this machine alone."
        ) from error


def settle(tree: Any) -> Any:
    """Wait for arrays, where programs in flight at once could block each other; else do nothing.

    CPU devices of a process share its threads. Of two programs in flight that both talk to other
    processes, the later one can hold the threads that the earlier one needs, for ever.
    """
    if jax.process_count() > 1 and jax.local_devices()[0].platform == "cpu":
        jax.block_until_ready(tree)
    return tree


def job(environment: Mapping[str, str], *, on_tpu: bool) -> dict[str, Any] | None:
    """Arguments for `jax.distributed.initialize`; None if this process is alone.

    Args:
      environment: the environment variables.
      on_tpu: whether this machine has TPU chips that JAX will use.

    Raises:
      InputError: the job is described in part or with impossible numbers.
    """
    if environment.get(COUNT) == "1":
        return None
    given = [name for name in (COORDINATOR, COUNT, NUMBER) if environment.get(name)]
    if len(given) == 3:
        count, number = _whole(environment, COUNT), _whole(environment, NUMBER)
        if not 0 <= number < count:
            raise InputError(
                f"{NUMBER} is {number}; it must be from 0 to {COUNT} - 1 = {count - 1}."
            )
        return {
            "coordinator_address": environment[COORDINATOR],
            "num_processes": count,
            "process_id": number,
        }
    if given:
        missing = [name for name in (COORDINATOR, COUNT, NUMBER) if name not in given]
        raise InputError(f"{given[0]} is set, so set {' and '.join(missing)} as well.")
    if all(name in environment for name in _SLURM) and _whole(environment, "SLURM_NTASKS") > 1:
        # JAX gives every task one GPU, which is right if there is a task for each; a task that
        # has a node to itself gets all of the node's.
        if environment["SLURM_NTASKS"] == environment.get("SLURM_STEP_NUM_NODES"):
            gpus = environment.get("SLURM_GPUS_ON_NODE")
            if gpus is not None:
                return {"local_device_ids": list(range(_whole(environment, "SLURM_GPUS_ON_NODE")))}
        return {}
    if on_tpu:
        return {}
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return {}
    return None


def _whole(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise InputError(f"{name} is {environment[name]!r}; it must be a whole number.") from None


def _on_tpu() -> bool:
    platforms = jax.config.jax_platforms  # type: ignore[attr-defined]
    if platforms and "tpu" not in platforms.split(","):
        return False
    chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None
