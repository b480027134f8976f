"""Put codec, coarse and fine model together as a model directory.

Reads the training runs, and `MODEL_CARD.md`, `COPYING` and the example clip where --out has them
already. All weights are rounded to bfloat16; of the models, the averaged ones are taken.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import codec_bridge
from vampnet_jax.release import Model, Stage, load, save
from vampnet_jax.training.checkpoints import load_run, read_run

FILES = ("config.json", "coarse.safetensors", "fine.safetensors", "codec.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--codec", type=Path, default=Path("runs/codec/codec.safetensors"))
    parser.add_argument("--coarse", type=Path, default=Path("runs/coarse"))
    parser.add_argument("--fine", type=Path, default=Path("runs/fine"))
    parser.add_argument("--out", type=Path, default=Path("vampnet_jax/models/tiny"))
    parser.add_argument("--name", default="tiny")
    a = parser.parse_args()
    codec = codec_bridge.load(a.codec)
    windows, stages = [], []
    for run in (a.coarse, a.fine):
        config, facts = read_run(run)
        if facts["codec"]["fingerprint"] != codec.fingerprint:
            sys.exit(f"{run} was trained on tokens of another codec than {a.codec}")
        windows.append(round(config.window_seconds * codec.sample_rate / codec.hop_length))
        stages.append(Stage(*load_run(run)))
    model = Model(*stages, codec, *windows, name=a.name)
    a.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=a.out.parent) as folder:
        save(model, Path(folder) / "model", dtype="bfloat16")
        for name in FILES:
            (Path(folder) / "model" / name).replace(a.out / name)
    load(a.out)
    total = sum(file.stat().st_size for file in a.out.iterdir())
    print(f"{a.out}: {total / 2**20:.1f} MiB, codec {codec.fingerprint[:12]}")


if __name__ == "__main__":
    main()
