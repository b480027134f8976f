"""Whole runs of `train.py` that move between machines: one process, two processes, one again."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import simulated_training as simulated
from small_runs import logged, small
from small_tokens import write_folder

from vampnet_jax.cli.train import main as train
from vampnet_jax.training.checkpoints import load_run

TRAIN = str(Path(__file__).parents[1] / "train.py")
SETTINGS = small(
    "--dropout=0.1",
    "--schedule=constant",
    "--validate-every=2",
    "--validation-excerpts=8",
    "--log-every=1",
    width=64,
    batch_size=8,
)
ONE_DEVICE = "--mesh=data=1,fsdp=1"


def in_two_processes(run: Path, *options: str) -> str:
    """Continue a run in two processes of four devices each; what the first says."""
    coordinator = f"localhost:{simulated.free_port()}"
    processes = [
        simulated.start(4, "--out", str(run), *options, job=(coordinator, 2, number), script=TRAIN)
        for number in range(2)
    ]
    return simulated.finish(*processes)


@pytest.fixture(scope="module")
def moved(tmp_path_factory) -> Path:
    """A run of two steps on eight devices that two processes of four continued to step 4."""
    folder = tmp_path_factory.mktemp("moved")
    tokens, run = folder / "tokens", folder / "run"
    write_folder(tokens, [60, 60, 200, 500, 90])
    begin = [str(tokens), "--out", str(run), "--steps=2", "--mesh=fsdp=8", *SETTINGS]
    assert "finished after step 2" in simulated.finish(simulated.start(8, *begin, script=TRAIN))
    said = in_two_processes(run, "--steps=4")
    assert "from step 2" in said
    assert "finished after step 4" in said
    return folder


@pytest.mark.slow
def test_a_run_moves_between_one_and_two_processes_and_keeps_its_losses(moved, tmp_path):
    stays, moves = tmp_path / "stays", tmp_path / "moves"
    tokens = str(moved / "tokens")
    assert train([tokens, "--out", str(stays), "--steps=6", ONE_DEVICE, *SETTINGS]) == 0
    shutil.copytree(moved / "run", moves)
    assert train(["--out", str(moves), "--steps=6", ONE_DEVICE]) == 0

    for name in ("train/loss", "train/gradient_norm", "validation/log_loss"):
        wanted, found = logged(stays, name), logged(moves, name)
        assert wanted.keys() == found.keys()
        np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=1e-5)
    weights = [load_run(run, step=6)[0]["head"]["kernel"] for run in (stays, moves)]
    np.testing.assert_allclose(*weights, atol=1e-5)


@pytest.mark.slow
def test_damage_that_only_one_process_sees_makes_all_fall_back_to_the_same_checkpoint(
    moved, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(moved / "run", run)
    # Parts of arrays above a kilobyte stay in the files of the process that wrote them.
    written_by_one = run / "checkpoints" / "4" / "state" / "ocdbt.process_1"
    files = [path for path in written_by_one.rglob("d/*") if path.is_file()]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    said = in_two_processes(run)
    assert "warning: checkpoint 4 is damaged (process 1: " in said
    assert "from step 2" in said
    assert "finished after step 4" in said
    assert (run / "damaged" / "4").is_dir()
    for name in ("train/loss", "validation/log_loss"):
        wanted, found = logged(moved / "run", name), logged(run, name)
        np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=1e-5)
