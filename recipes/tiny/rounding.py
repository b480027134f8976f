"""What storing weights in bfloat16 or int8 costs: loss on the validation split.

int8: 255 equal steps, with one scale for every place of an array's last axis, which layers, heads
and codebooks share; arrays of one axis as they are.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from clips import validation_tokens

from vampnet_jax.training.checkpoints import load_run
from vampnet_jax.training.validation import Validation


def to_int8(weights: jax.Array) -> jax.Array:
    """Round to int8 and back."""
    if weights.ndim < 2:
        return weights
    largest = jnp.abs(weights).max(axis=tuple(range(weights.ndim - 1)), keepdims=True)
    scale = jnp.maximum(largest, 1e-12) / 127
    return jnp.round(weights / scale) * scale


WAYS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "float32": lambda weights: weights,
    "bfloat16": lambda weights: weights.astype(jnp.bfloat16).astype(jnp.float32),
    "int8": to_int8,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="as train.py wrote them")
    parser.add_argument("--tokens", type=Path, default=Path("data/tokens"))
    parser.add_argument("--excerpts", type=int, default=64)
    a = parser.parse_args()
    print("| |", " | ".join(WAYS), "|")
    print("|---|" + "---|" * len(WAYS))
    for run in a.runs:
        params, config = load_run(run)
        reader, window = validation_tokens(run, a.tokens)
        validation = Validation(reader, config, window, a.excerpts, 4)
        cells = []
        for way in WAYS.values():
            rounded = jax.tree.map(way, params)
            cells.append(f"{validation.score(rounded)['log_loss']:.4f}")
        print(f"| {run.name}, nats per masked token |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
