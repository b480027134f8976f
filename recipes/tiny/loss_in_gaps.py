"""Loss of trained models in the gaps between groups of kept frames.

Nats per masked token and top-1 accuracy on excerpts of the validation split, every token of a gap
masked. What `train.py` reports is of masks that are everywhere alike.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from clips import validation_tokens

from vampnet_jax.training.checkpoints import load_run
from vampnet_jax.training.excerpts import fixed_excerpts
from vampnet_jax.training.objective import masked_sums

PERIODS = (4, 6, 9)
KEPT = 3
"""Frames at the start of every period."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="as train.py wrote them")
    parser.add_argument("--tokens", type=Path, default=Path("data/tokens"))
    parser.add_argument("--excerpts", type=int, default=64)
    a = parser.parse_args()
    print("| run |", " | ".join(f"{KEPT} of {period} kept" for period in PERIODS), "|")
    print("|---|" + "---|" * len(PERIODS))
    for run in a.runs:
        params, config = load_run(run)
        reader, n_frames = validation_tokens(run, a.tokens)
        tokens, _ = fixed_excerpts(reader, config.n_codebooks, n_frames, a.excerpts)
        score = jax.jit(lambda params, mask, tokens=tokens, config=config: masked_sums(
            params, jnp.asarray(tokens, jnp.int32), mask, config
        ))  # fmt: skip
        cells = []
        for period in PERIODS:
            mask = np.zeros(tokens.shape, bool)
            mask[:, config.n_conditioning_codebooks :] = np.arange(n_frames) % period >= KEPT
            sums = score(params, mask)
            n = float(sums.tokens.sum())
            loss, hits = float(sums.log_loss.sum()) / n, float(sums.top_1.sum()) / n
            cells.append(f"{loss:.3f} ({hits:.1%})")
        print(f"| {run.name} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
