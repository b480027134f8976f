"""Small training runs for tests: what `train.py` is told, and what it logged."""

import json
from pathlib import Path


def small(*more: str, width: int = 16, batch_size: int = 4) -> list[str]:
    """Options of a minute model of two codebooks, on 2-second excerpts of `small_tokens`."""
    return [
        "--n-codebooks=2",
        "--n-layers=1",
        "--n-heads=2",
        f"--embedding-dim={width}",
        "--window-seconds=2",
        f"--batch-size={batch_size}",
        "--seed=5",
        *more,
    ]


def log(run: Path) -> list[dict]:
    """The lines of the log; one that a kill cut off does not count."""
    path = run / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def logged(run: Path, name: str = "train/loss") -> dict[int, float]:
    """Step → what was logged of it."""
    return {line["step"]: line[name] for line in log(run) if name in line}
