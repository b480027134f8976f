"""Whole runs of `train.py` that move between machines: one process, two processes, one again."""

import json
from pathlib import Path

import numpy as np
import pytest
import simulated_training as simulated
from small_tokens import write_folder

from vampnet_jax.cli.train import main as train
from vampnet_jax.training.checkpoints import load_run

TRAIN = str(Path(__file__).parents[1] / "train.py")
SETTINGS = [
    "--n-codebooks=2",
    "--n-layers=1",
    "--n-heads=2",
    "--embedding-dim=16",
    "--dropout=0.1",
    "--window-seconds=2",
    "--batch-size=8",
    "--schedule=constant",
    "--validate-every=2",
    "--validation-excerpts=8",
    "--log-every=1",
    "--seed=5",
]


def losses(run: Path, name: str = "train/loss") -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


@pytest.mark.slow
def test_a_run_moves_between_one_and_two_processes_and_keeps_its_losses(tmp_path):
    tokens, stays, moves = tmp_path / "tokens", tmp_path / "stays", tmp_path / "moves"
    write_folder(tokens, [60, 60, 200, 500, 90])
    one = "--mesh=data=1,fsdp=1"
    assert train([str(tokens), "--out", str(stays), "--steps=6", one, *SETTINGS]) == 0

    assert train([str(tokens), "--out", str(moves), "--steps=2", "--mesh=fsdp=2", *SETTINGS]) == 0
    coordinator = f"localhost:{simulated.free_port()}"
    processes = [
        simulated.start(
            4, "--out", str(moves), "--steps=4", job=(coordinator, 2, number), script=TRAIN
        )
        for number in range(2)
    ]
    said = simulated.finish(*processes)
    assert "from step 2" in said
    assert "finished after step 4" in said
    assert train(["--out", str(moves), "--steps=6", one]) == 0

    for name in ("train/loss", "train/gradient_norm", "validation/log_loss"):
        wanted, found = losses(stays, name), losses(moves, name)
        assert wanted.keys() == found.keys()
        np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=1e-5)
    weights = [load_run(run, step=6)[0]["head"]["kernel"] for run in (stays, moves)]
    np.testing.assert_allclose(*weights, atol=1e-5)
