"""Give the models of a directory the codes of another codec, to train them on with its tokens.

For a codec that was trained further (tune_codec.py): its codes have moved, but mean something like
what they did, so `train.py --init-from` the directory written here does not begin from nothing.
"""

import argparse
import dataclasses
from pathlib import Path

import jax.numpy as jnp

import codec_bridge
from vampnet_jax.release import Stage, load, save


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="in the box, or a model directory")
    parser.add_argument("--codec", type=Path, default=Path("runs/tuned/codec.safetensors"))
    parser.add_argument("--out", type=Path, default=Path("runs/adopted"))
    a = parser.parse_args()
    model, codec = load(a.model), codec_bridge.load(a.codec)
    codes = jnp.asarray(codec.codebooks)

    def adopting(stage: Stage) -> Stage:
        embedding = stage.params["embedding"]
        embedding = embedding | {"codebooks": codes[: len(embedding["codebooks"])]}
        return stage._replace(params=stage.params | {"embedding": embedding})

    coarse, fine = adopting(model.coarse), adopting(model.fine)
    save(dataclasses.replace(model, coarse=coarse, fine=fine, codec=codec), a.out, overwrite=True)


if __name__ == "__main__":
    main()
