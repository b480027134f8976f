"""Make variations of the training tracks, for `tune_decoder.py`: what the decoder hears in use.

Frames are kept in all codebooks as tiny's presets keep them, with a period of its own for every
window. One file per track, uint16 [C, T]. Variants of tracks (`~1`) are left out.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
from cache_music import MADE_BY, VARIANT, write_json

import vampnet_jax as vampnet
from codec_bridge.atomic import atomic_write
from vampnet_jax.prompts import Prompt
from vampnet_jax.training.excerpts import choose_tracks
from vampnet_jax.training.tokens import TrackReader, read_manifest

KEPT = ((1, 2), (1, 3), (1, 5), (3, 4), (3, 9))
"""Frames that are kept, of how many: as in tiny's presets, and fewer."""
STEPS = 6
"""Of the coarse model; more made no difference with the tiny of docs/performance.md."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="name or directory")
    parser.add_argument("--tokens", type=Path, default=Path("data/tokens"))
    parser.add_argument("--out", type=Path, default=Path("data/variations"))
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    manifest = read_manifest(a.tokens)
    model = vampnet.load(a.model)
    if manifest.codec.fingerprint != model.codec.fingerprint:
        sys.exit(f"{a.tokens} was made by another codec than that of {a.model}")
    coarse = model.coarse_sampling.changed(steps=STEPS)
    made_by = model.fingerprints | {"seed": a.seed, "kept": KEPT}
    made_by["sampling"] = [dataclasses.asdict(x) for x in (coarse, model.fine_sampling)]
    made_by = json.loads(json.dumps(made_by))  # as it is read back
    known = json.loads((a.out / MADE_BY).read_text()) if (a.out / MADE_BY).exists() else None
    if known != made_by and any(a.out.rglob("*.npy")):
        sys.exit(f"{a.out} holds variations made in another way; name another --out")
    a.out.mkdir(parents=True, exist_ok=True)
    write_json(a.out / MADE_BY, made_by)
    originals = [t for t in choose_tracks(manifest, "train") if VARIANT not in t.name]
    reader = TrackReader(a.tokens, manifest, originals)
    window, frame_rate = model.coarse_window, model.codec.frame_rate
    for number, track in enumerate(reader.tracks):
        path = a.out / f"{track.name}.npy"
        if path.exists():
            continue
        tokens = np.asarray(reader.read(number, 0, track.frames)[0])[None]
        key = jax.random.fold_in(jax.random.key(a.seed), number)
        mask_key, key = jax.random.split(key)
        rng = np.random.default_rng((a.seed, number))
        parts = []
        for start in range(0, track.frames, window):
            shape = tokens[:, :, start : start + window].shape
            width, period = rng.choice(KEPT).tolist()
            prompt = Prompt(periodic=period, width=width, upper_codebooks=shape[1])
            part_key = jax.random.fold_in(mask_key, start)
            parts.append(np.asarray(prompt.mask(shape, part_key, frame_rate=frame_rate)))
        made = vampnet.vamp(model, tokens, np.concatenate(parts, axis=2), key, coarse)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.save(file, np.asarray(made)[0].astype(np.uint16))
        print(f"{number + 1}/{len(reader.tracks)} {track.name}", flush=True)


if __name__ == "__main__":
    main()
