"""Trains a minute model on simulated devices, in a process of its own; prints losses as JSON.

    JAX_NUM_CPU_DEVICES=8 python tests/simulated_training.py MESH...

MESH is as `train.py --mesh` takes it; with "+N" the batch is accumulated in N parts, with "+lora"
adapters of a model that stays as it is are trained. Several processes make one job, as on a
cluster, by the variables that `vampnet_jax.training.distributed` reads.
"""

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

STEPS, BATCH = 20, 16
TARGETS = ("query", "key", "value", "out", "up", "down")


def start(
    devices: int, *meshes: str, job: tuple[str, int, int] | None = None, script: str = __file__
) -> subprocess.Popen:
    """Start a process with so many devices; `job` is (coordinator, processes, number)."""
    # Eight devices on two cores need no threads of their own.
    flags = "--xla_cpu_multi_thread_eigen=false"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "XLA_FLAGS": flags}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    if job:
        names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        environment |= dict(zip(names, map(str, job), strict=True))
    return subprocess.Popen(
        [sys.executable, script, *meshes],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*processes: subprocess.Popen) -> str:
    """Wait for all processes of a job; what the first printed."""
    outputs = wait(*processes)
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
        assert "Exception ignored" not in errors
    return outputs[0][0]


def wait(*processes: subprocess.Popen) -> list[tuple[str, str]]:
    """What all processes of a job printed, and their errors; whatever their status is."""
    # All are read at once: one whose pipe is full would wait, and the others for it.
    with ThreadPoolExecutor(len(processes)) as readers:
        try:
            return list(readers.map(lambda process: process.communicate(timeout=900), processes))
        finally:
            for process in processes:
                process.kill()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def train(mesh: str) -> dict:
    """Losses of all steps, and bytes by device and in all.

    The bytes are those of parameters and moments, with adapters those of what they adapt.
    """
    import jax
    import numpy as np

    import vampnet_jax as vampnet
    from vampnet_jax.lora import LoraConfig
    from vampnet_jax.training.config import TrainConfig
    from vampnet_jax.training.loop import with_frozen
    from vampnet_jax.training.sharding import plan
    from vampnet_jax.training.step import init_on, jitted_step

    mesh, _, way = mesh.partition("+")
    adapts = way == "lora"
    model = vampnet.ModelConfig(
        n_codebooks=3,
        n_conditioning_codebooks=1,
        n_layers=2,
        n_heads=2,
        embedding_dim=64,
        vocab_size=32,
    )
    config = TrainConfig(
        model=model,
        lora=LoraConfig(rank=2, alpha=8.0, targets=TARGETS) if adapts else None,
        batch_size=BATCH,
        accumulate=1 if adapts else int(way or 1),
        steps=STEPS,
        schedule="constant",
        learning_rate=3e-3,
        warmup_steps=5,
    )
    layout = plan(model, BATCH, mesh, accumulate=config.accumulate)
    rng = np.random.default_rng(0)
    codebooks = rng.standard_normal((3, 32, 8)).astype(np.float32)
    state = init_on(layout, config, codebooks, np.full((3, 32), 1 / 32))
    if adapts:
        adapted = jax.tree.map(np.asarray, vampnet.init(jax.random.key(1), model, codebooks))
        state = with_frozen(state, adapted, config, layout)
    divided = jax.tree.leaves(state.frozen if adapts else (state.params, state.moments))
    parts = [part for leaf in divided for part in leaf.addressable_shards]
    by_device = [
        sum(part.data.nbytes for part in parts if part.device == device)
        for device in layout.mesh.local_devices
    ]
    number, count = layout.share(BATCH)
    rows = slice(number * BATCH // count, (number + 1) * BATCH // count)
    step = jitted_step(config, layout)
    losses = []
    for _ in range(STEPS):
        tokens = rng.integers(0, 32, (BATCH, 3, 12)).astype(np.int32)
        state, metrics = step(state, layout.place_batch(tokens[rows], BATCH), np.float32(0))
        losses.append(float(metrics["loss"]))
    return {
        "losses": losses,
        "devices": layout.mesh.size,
        "bytes": by_device,
        "total": sum(leaf.nbytes for leaf in divided),
    }


def main(meshes: list[str]) -> None:
    from vampnet_jax.training.distributed import connect

    connect()
    print(json.dumps({mesh: train(mesh) for mesh in meshes}))


if __name__ == "__main__":
    main(sys.argv[1:])
