"""What storing weights in bfloat16 or int8 costs: loss and mel distance on the validation split.

int8: matrices and convolutions in 255 equal steps up to the largest weight of every output,
vectors as they are.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from train_codec import CONFIG, Excerpts, MelDistance, validate

from codec_bridge.descript import import_dac
from vampnet_jax.training.checkpoints import load_run, read_run
from vampnet_jax.training.excerpts import choose_tracks, long_enough
from vampnet_jax.training.tokens import TrackReader, read_manifest
from vampnet_jax.training.validation import Validation


def to_int8(weights: np.ndarray, outputs: int) -> np.ndarray:
    """Round, with one scale per place of axis `outputs`."""
    if weights.ndim < 2:
        return weights
    others = tuple(axis for axis in range(weights.ndim) if axis != outputs % weights.ndim)
    scale = np.abs(weights).max(axis=others, keepdims=True) / 127
    return (np.round(weights / np.maximum(scale, 1e-12)) * scale).astype(np.float32)


def to_bfloat16(weights: np.ndarray, outputs: int) -> np.ndarray:
    """Round to bfloat16."""
    return np.asarray(jnp.asarray(weights).astype(jnp.bfloat16).astype(jnp.float32))


def as_it_is(weights: np.ndarray, outputs: int) -> np.ndarray:
    """No rounding."""
    return weights


WAYS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "float32": as_it_is,
    "bfloat16": to_bfloat16,
    "int8": to_int8,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help="as train.py wrote them")
    parser.add_argument("--codec", type=Path, help="checkpoint.pt of train_codec or tune_decoder")
    parser.add_argument("--tokens", type=Path, default=Path("data/tokens"))
    parser.add_argument("--music", type=Path, default=Path("data/music"))
    parser.add_argument("--split", type=Path, default=Path(__file__).parent / "split.json")
    parser.add_argument("--excerpts", type=int, default=64)
    a = parser.parse_args()
    print("| |", " | ".join(WAYS), "|")
    print("|---|" + "---|" * len(WAYS))
    for run in a.runs:
        params, config = load_run(run)
        manifest = read_manifest(a.tokens)
        frame_rate = manifest.codec.sample_rate / manifest.codec.hop_length
        window = round(read_run(run)[0].window_seconds * frame_rate)
        tracks, _ = long_enough(choose_tracks(manifest, "validation"), window, "validation")
        reader = TrackReader(a.tokens, manifest, tracks)
        validation = Validation(reader, config, window, a.excerpts, 4)
        cells = []
        for way in WAYS.values():  # Flax keeps outputs last
            rounded = jax.tree.map(lambda x, way=way: jnp.asarray(way(np.asarray(x), -1)), params)
            cells.append(f"{validation.score(rounded)['log_loss']:.4f}")
        print(f"| {run.name}, nats per masked token |", " | ".join(cells), "|", flush=True)
    if a.codec:
        model = import_dac().DAC(**CONFIG)
        weights = torch.load(a.codec, weights_only=True)["ema"]
        names = json.loads(a.split.read_text())["validation"]
        held = Excerpts(a.music, names).draw(np.random.default_rng(1), 12, 96_000, 0)
        distance = MelDistance([(2048, 150), (512, 80)])
        cells = []
        for way in WAYS.values():  # PyTorch keeps outputs first
            rounded = {k: torch.from_numpy(way(v.numpy(), 0)) for k, v in weights.items()}
            value = validate(model, rounded, held, distance)
            cells.append("none" if math.isnan(value) else f"{value:.4f}")
        print(f"| {a.codec.parent.name}, mel distance |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
