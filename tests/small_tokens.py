"""Small folders of tokens for tests."""

from pathlib import Path

import numpy as np

from vampnet_jax.training.excerpts import choose_tracks
from vampnet_jax.training.tokens import (
    CodecInfo,
    Manifest,
    Track,
    TrackReader,
    pack_records,
    read_manifest,
    write_codebooks,
    write_manifest,
    write_shard,
)

CODEC = CodecInfo("c0dec" * 10, "dac", 100, 10, n_codebooks=3, codebook_size=16)


def write_folder(
    folder: Path,
    lengths: list[int],
    *,
    splits: bool = True,
    quiet: int = 0,
    codec: CodecInfo = CODEC,
    codebooks: np.ndarray | None = None,
) -> None:
    """Tokens of frame f of track i are (f + i, 2f, 3f …) mod V; the first `quiet` ones whisper."""
    folder.mkdir(parents=True)
    tracks, records = [], []
    for i, frames in enumerate(lengths):
        f = np.arange(frames)
        loudness = np.where(f < quiet, -60.0, -20.0)
        rows = [f + i, *((c + 1) * f for c in range(1, codec.n_codebooks))]
        blobs = pack_records(np.stack(rows) % codec.codebook_size, loudness)
        source = f"source{i % 2}"
        split = ("validation" if i < 2 else "train") if splits else None
        tracks.append(
            Track(f"{source}/{i}", source, frames / codec.frame_rate, frames,
                  "tokens-00000.arrayrecord", len(records), split, 0, 0)
        )  # fmt: skip
        records += blobs
    write_shard(folder / "tokens-00000.arrayrecord", records)
    if codebooks is None:
        shape = (codec.n_codebooks, codec.codebook_size, 8)
        codebooks = np.random.default_rng(0).standard_normal(shape)
    write_codebooks(folder, codebooks, codec.fingerprint)
    write_manifest(folder, Manifest(codec, tuple(tracks)))


def reader(folder: Path, split: str = "train") -> TrackReader:
    manifest = read_manifest(folder)
    return TrackReader(folder, manifest, choose_tracks(manifest, split))
