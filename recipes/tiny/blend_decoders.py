"""Weights between those of two tuned decoders: a step back towards mel distance, or from buzz.

Both come from one run of tune_decoder.py after another, so that the weights between them are good
as well ("Robust fine-tuning of zero-shot models", Wortsman et al., 2022).
"""

import argparse
import sys
from pathlib import Path

import torch
from codec_model import export, read_codec


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("before", type=Path, help="checkpoint.pt of tune_decoder.py")
    parser.add_argument("after", type=Path, help="of a run that went on from it")
    parser.add_argument("--share", type=float, default=0.85, help="of the second")
    parser.add_argument("--out", type=Path, default=Path("runs/blended"))
    a = parser.parse_args()
    before, after = (read_codec(path) for path in (a.before, a.after))
    for name in before.keys() | after.keys():
        if not name.startswith("decoder.") and not torch.equal(before[name], after[name]):
            sys.exit(f"{a.before} and {a.after} differ in {name}, not in the decoder alone")
    a.out.mkdir(parents=True, exist_ok=True)
    export({name: torch.lerp(before[name], after[name], a.share) for name in after}, a.out)


if __name__ == "__main__":
    main()
