"""Count the tokens of the training split and keep their frequencies beside the model.

Writes frequencies.safetensors into the model directory: what `vampnet compress` codes tokens under.
Without it every token costs log2 of the codebook's size. A source counts by the square root of its
length, so that none decides alone. Prints the entropies.
"""

import argparse
import math
from pathlib import Path

import numpy as np

from vampnet_jax.compression.frequencies import FREQUENCIES, quantise, save_frequencies
from vampnet_jax.release import read_description
from vampnet_jax.training.excerpts import choose_tracks
from vampnet_jax.training.tokens import TrackReader, read_manifest
from vampnet_jax.training.validation import token_frequencies


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--tokens", type=Path, default=Path("data/tokens"))
    parser.add_argument("--model", type=Path, default=Path("vampnet_jax/models/tiny"))
    a = parser.parse_args()
    description = read_description(a.model)
    manifest = read_manifest(a.tokens)
    if manifest.codec.fingerprint != description["codec"]["fingerprint"]:
        parser.error(f"{a.tokens} was made by another codec than that of {a.model}")
    tracks = choose_tracks(manifest, "train")
    frequencies, hours = 0.0, 0.0
    for source in sorted({track.source for track in tracks}):
        here = [track for track in tracks if track.source == source]
        seconds = sum(track.seconds for track in here)
        frequencies += math.sqrt(seconds) * token_frequencies(TrackReader(a.tokens, manifest, here))
        hours += seconds / 3600
    n_codebooks = description["fine"]["config"]["n_codebooks"]
    frequencies = frequencies[:n_codebooks] / frequencies[0].sum()
    save_frequencies(a.model, frequencies, manifest.codec.fingerprint)
    p = quantise(frequencies) / 2**16
    entropies = -(p * np.log2(p)).sum(axis=1)
    print(f"{a.model / FREQUENCIES}: {hours:.2f} h of music; bits per token of each codebook:")
    print(", ".join(f"{bits:.2f}" for bits in entropies))


if __name__ == "__main__":
    main()
