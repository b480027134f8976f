"""`kill -9` at random moments, also inside a save, costs nothing but the time since the last save.

Three kills, or as many as the environment variable VAMPNET_KILLS says.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import simulated_training
from small_runs import log, small
from small_tokens import write_folder

from vampnet_jax.cli.status import TRY_AGAIN
from vampnet_jax.training.checkpoints import Checkpoints, load_run

KILLS = int(os.environ.get("VAMPNET_KILLS", "3"))
STEPS = 60 * (KILLS + 1)
ROOT = Path(__file__).parent.parent
OPTIONS = small("--dropout=0.1")
FATE = ("loss", "log_loss", "gradient_norm", "parameter_norm", "learning_rate")


def start(tokens: Path, run: Path, cache: Path) -> subprocess.Popen:
    options = [*OPTIONS, f"--steps={STEPS}", "--save-every=4", "--log-every=1"]
    command = [sys.executable, str(ROOT / "train.py"), str(tokens), "--out", str(run), *options]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def trained(run: Path) -> dict[int, list[float]]:
    """Step → what was logged of it."""
    lines = [line for line in log(run) if "train/loss" in line]
    return {line["step"]: [line[f"train/{name}"] for name in FATE] for line in lines}


def unfinished_saves(run: Path) -> set[str]:
    try:
        return {name for name in os.listdir(run / "checkpoints") if "tmp" in name}
    except FileNotFoundError:
        return set()


def kill_at_a_random_moment(process: subprocess.Popen, run: Path, draw: random.Random) -> None:
    before = len(trained(run))
    while process.poll() is None and len(trained(run)) <= before:
        time.sleep(0.02)
    time.sleep(draw.uniform(0, 0.4))
    process.send_signal(signal.SIGKILL)


def kill_inside_a_save(process: subprocess.Popen, run: Path, draw: random.Random) -> None:
    old, seen, wanted = unfinished_saves(run), set(), draw.randint(1, 6)
    while process.poll() is None and len(seen) < wanted:
        seen |= unfinished_saves(run) - old
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_never_was(tmp_path):
    tokens, cache = tmp_path / "tokens", tmp_path / "cache"
    write_folder(tokens, [60, 60, 200, 900])
    whole, run = tmp_path / "whole", tmp_path / "run"
    process = start(tokens, whole, cache)
    assert process.wait(timeout=1800) == 0, process.stderr.read()
    expected = trained(whole)
    assert list(expected) == list(range(1, STEPS + 1))

    draw = random.Random(os.environ.get("VAMPNET_KILL_SEED", "0"))
    inside = 0
    for kill in range(KILLS):
        process = start(tokens, run, cache)
        (kill_inside_a_save if kill % 2 else kill_at_a_random_moment)(process, run, draw)
        assert process.wait(timeout=600) == -signal.SIGKILL, process.stderr.read()
        inside += bool(unfinished_saves(run))
        # Whatever came after a restart is what the uninterrupted run had, number by number.
        so_far = trained(run)
        assert list(so_far) == list(range(1, len(so_far) + 1))
        assert so_far == {step: expected[step] for step in so_far}
    assert inside > 0

    process = start(tokens, run, cache)
    assert process.wait(timeout=1800) == 0, process.stderr.read()
    assert trained(run) == expected
    ends = [load_run(folder, step=STEPS)[0] for folder in (whole, run)]
    jax.tree.map(np.testing.assert_array_equal, *ends)


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_makes_both_save_the_same_step_and_one_continues(tmp_path):
    tokens, run = tmp_path / "tokens", tmp_path / "run"
    write_folder(tokens, [60, 60, 200, 900])
    command = [str(tokens), "--out", str(run), *OPTIONS, "--log-every=20"]
    address = f"localhost:{simulated_training.free_port()}"
    job = [
        simulated_training.start(
            1, *command, "--steps=1000000", job=(address, 2, number), script=str(ROOT / "train.py")
        )
        for number in range(2)
    ]
    while all(process.poll() is None for process in job):
        if trained(run):
            job[1].send_signal(signal.SIGTERM)
            break
        time.sleep(0.1)
    shown = simulated_training.wait(*job)
    assert [process.returncode for process in job] == [TRY_AGAIN, TRY_AGAIN], shown
    assert "stopped after step" in shown[0][0]
    assert "parameters" in shown[0][0]
    assert "parameters" not in shown[1][0]  # one process speaks
    (step,) = Checkpoints(run, keep=2, read_only=True).steps

    alone = simulated_training.start(
        2, *command, f"--steps={step + 1}", script=str(ROOT / "train.py")
    )
    assert f"from step {step}" in simulated_training.finish(alone)
    assert Checkpoints(run, keep=2, read_only=True).steps == [step, step + 1]
