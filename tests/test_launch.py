"""The script that starts training again until it is done, with a stand-in for Python."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "recipes" / "launch"


def start(tmp_path: Path, statuses: list[int], *, sleeps: float = 0) -> subprocess.Popen:
    """Run the script; the n-th time "training" ends with statuses[n]."""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/bash\n"
        f"trap 'sleep 0.3; touch {tmp_path}/saved; exit 75' TERM\n"
        f"touch {tmp_path}/count\n"
        f"n=$(wc -l < {tmp_path}/count)\n"
        f"echo >> {tmp_path}/count\n"
        f"statuses=({' '.join(map(str, statuses))})\n"
        # Last: bash that is asked to terminate while it reads $(…) may not get to its trap.
        f'echo "$@" >> {tmp_path}/calls\n'
        f"for ((i = 0; i < {int(sleeps * 20)}; i++)); do sleep 0.05; done\n"
        "exit ${statuses[n]}\n"
    )
    python.chmod(0o755)
    return subprocess.Popen(
        [SCRIPTS / "one_machine.sh", "tokens", "--out", "a run"],
        env=os.environ | {"PYTHON": str(python), "PAUSE": "0"},
        stderr=subprocess.PIPE,
        text=True,
    )


def calls(tmp_path: Path) -> list[str]:
    return (tmp_path / "calls").read_text().splitlines()


@pytest.mark.parametrize(
    ("statuses", "status", "times"),
    [
        ([0], 0, 1),
        ([75, 75, 75, 75, 75, 75, 0], 0, 7),  # asked to stop and saved: as often as it takes
        ([137, 1, 0], 0, 3),  # killed, crashed
        ([2], 2, 1),  # bad input
        ([130], 130, 1),
        ([1, 1, 1, 1, 1], 1, 5),
    ],
)
def test_training_is_started_again_until_it_is_done_or_a_person_is_needed(
    tmp_path, statuses, status, times
):
    script = start(tmp_path, statuses)
    script.communicate(timeout=60)
    assert script.returncode == status
    assert len(calls(tmp_path)) == times
    assert all(line.endswith("train.py tokens --out a run") for line in calls(tmp_path))


def test_asked_to_terminate_it_asks_training_and_waits_for_it(tmp_path):
    script = start(tmp_path, [0], sleeps=30)
    while not (tmp_path / "calls").exists():
        assert script.poll() is None
    script.send_signal(signal.SIGTERM)
    script.communicate(timeout=20)
    assert script.returncode == 75
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPTS.iterdir()))
def test_launch_scripts_are_valid(script):
    subprocess.run(["bash", "-n", SCRIPTS / script], check=True)
