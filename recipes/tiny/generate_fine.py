"""Generate the fine tokens of the training tracks, given their true coarse ones.

What the decoder will hear when music is made, for `tune_decoder.py`: one file per track,
uint16 [C, T].
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import vampnet_jax as vampnet
from codec_bridge.atomic import atomic_write
from vampnet_jax.training.excerpts import choose_tracks
from vampnet_jax.training.tokens import TrackReader, read_manifest


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="name or directory")
    parser.add_argument("--tokens", type=Path, default=Path("data/tokens"))
    parser.add_argument("--out", type=Path, default=Path("data/generated"))
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    manifest = read_manifest(a.tokens)
    model = vampnet.load(a.model)
    if manifest.codec.fingerprint != model.codec.fingerprint:
        sys.exit(f"{a.tokens} was made by another codec than that of {a.model}")
    reader = TrackReader(a.tokens, manifest, choose_tracks(manifest, "train"))
    for number, track in enumerate(reader.tracks):
        path = a.out / f"{track.name}.npy"
        if path.exists():
            continue
        tokens = np.asarray(reader.read(number, 0, track.frames)[0])[None]
        mask = vampnet.masks.keep_codebooks(
            jnp.ones(tokens.shape, bool), model.coarse.config.n_codebooks
        )
        key = jax.random.fold_in(jax.random.key(a.seed), number)
        made = np.asarray(vampnet.vamp(model, tokens, mask, key))[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.save(file, made.astype(np.uint16))
        print(f"{number + 1}/{len(reader.tracks)} {track.name}", flush=True)


if __name__ == "__main__":
    main()
