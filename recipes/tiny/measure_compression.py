"""Bits per token of lossless files on the test split: all codes alike, the table, the model.

Prints one table, and how far the payload under the table is from -sum log2 p. Every file is read
again and must give the tokens that went in.
"""

import argparse
from pathlib import Path

import numpy as np

from vampnet_jax.compression.coding import grid
from vampnet_jax.compression.compressor import Compressor
from vampnet_jax.compression.container import HEADER_BYTES
from vampnet_jax.compression.range_coding import information
from vampnet_jax.pipeline import Clip
from vampnet_jax.training.excerpts import choose_tracks, fixed_excerpts, long_enough
from vampnet_jax.training.tokens import TrackReader, read_manifest


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="name or directory")
    parser.add_argument("--tokens", type=Path, default=Path("data/tokens"))
    parser.add_argument("--excerpts", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=10.0)
    a = parser.parse_args()
    compressor = Compressor.load(a.model)
    codec, n_codebooks = compressor.model.codec, compressor.n_codebooks
    manifest = read_manifest(a.tokens)
    if manifest.codec.fingerprint != codec.fingerprint:
        parser.error(f"{a.tokens} was made by another codec than that of {a.model}")
    if not compressor.has_table:
        parser.error(f"{a.model} has no table; make one with recipes/tiny/token_frequencies.py")
    n_frames = round(a.seconds * codec.frame_rate)
    tracks, _ = long_enough(choose_tracks(manifest, "test"), n_frames, "test")
    reader = TrackReader(a.tokens, manifest, tracks)
    excerpts, _ = fixed_excerpts(reader, n_codebooks, n_frames, a.excerpts)
    keep = grid(n_codebooks, n_frames, 1)
    sizes: dict[str, list[int]] = {"table": [], "model": []}
    least = 0.0
    for tokens in excerpts:
        clip = Clip(tokens[None], n_frames * codec.hop_length)
        for name in sizes:
            data = compressor.compress(clip, keep, period=1, with_model=name == "model")
            assert (compressor.read(data).tokens[0] == tokens).all()
            sizes[name].append(8 * (len(data) - HEADER_BYTES))
        pairs = zip(tokens, compressor.table, strict=True)
        least += sum(information(row, table) for row, table in pairs)
    count = len(excerpts) * keep.size
    bits = {"all alike": np.log2(codec.codebook_size)}
    bits |= {name: sum(values) / count for name, values in sizes.items()}
    print(f"{len(excerpts)} excerpts of {a.seconds:g} s, {count} tokens\n")
    print("| frequencies | bits per token | bit/s | saved |\n|---|---|---|---|")
    for name, value in bits.items():
        rate = value * n_codebooks * codec.frame_rate
        print(f"| {name} | {value:.3f} | {rate:.0f} | {1 - value / bits['all alike']:.1%} |")
    print(f"\ntable over -sum log2 p: {sum(sizes['table']) / least - 1:.3%}")


if __name__ == "__main__":
    main()
