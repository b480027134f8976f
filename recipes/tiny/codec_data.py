"""Random excerpts of the training music, alone and with tokens of variations (a module)."""

import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
from cache_music import MADE_BY, VARIANT
from codec_model import HOP
from torch import nn

from vampnet_jax.training.excerpts import choose_tracks, long_enough
from vampnet_jax.training.tokens import TrackReader, read_codebooks, read_manifest

MARGIN = 6
"""Frames at both ends of an excerpt that only give context."""


def track_weights(sources: list[str], seconds: list[float]) -> np.ndarray:
    """How often to draw from each track: from large sources more, but not in proportion."""
    weights = np.array(seconds)
    for source in set(sources):
        here = np.array(sources) == source
        weights[here] /= math.sqrt(weights[here].sum())
    return weights / weights.sum()


class Excerpts:
    """Random excerpts of the tracks on one side of the split, at about -24 LUFS."""

    def __init__(self, music: Path, names: list[str]):
        index = json.loads((music / "index.json").read_text())
        names = [n for n in names if n in index]
        if not names:
            sys.exit(f"no tracks of the split found in {music}; run cache_music.py first")
        self.names = names
        self.files = [music / f"{n}.wav" for n in names]
        self.lengths = [soundfile.info(file).frames for file in self.files]
        self.gains = [10 ** ((-24 - max(index[n]["loudness"], -60)) / 20) for n in names]
        self.weights = track_weights(
            [n.split("/")[0] for n in names], [index[n]["seconds"] for n in names]
        )

    def draw(self, rng: np.random.Generator, n: int, samples: int, spread: float) -> torch.Tensor:
        """[n, 1, samples] float32; the gain varies by a normal of `spread` dB."""
        out = np.zeros((n, samples), np.float32)
        for row, i in enumerate(rng.choice(len(self.files), n, p=self.weights)):
            start = int(rng.integers(0, max(1, self.lengths[i] - samples)))
            excerpt, _ = soundfile.read(self.files[i], samples, start, dtype="float32")
            if np.abs(excerpt).max(initial=0) < 1e-3:  # silence teaches nothing: once more
                start = int(rng.integers(0, max(1, self.lengths[i] - samples)))
                excerpt, _ = soundfile.read(self.files[i], samples, start, dtype="float32")
            gain = self.gains[i] * 10 ** (np.clip(rng.normal(0, spread), -12, 9) / 20)
            excerpt *= min(gain, 1 / max(float(np.abs(excerpt).max()), 1e-4))
            out[row, : len(excerpt)] = excerpt * (rng.integers(0, 2) * 2 - 1)
        return torch.from_numpy(out)[:, None]


def validation_excerpts(music: Path, split: dict[str, list[str]]) -> torch.Tensor:
    """[12, 1, samples] 4 s each, always the same."""
    return Excerpts(music, split["validation"]).draw(np.random.default_rng(1), 12, 96_000, 0)


class Excerpt(NamedTuple):
    """Music, its tokens or a variation's, and which frames have all the music's tokens."""

    audio: torch.Tensor  # [1, 1, frames · HOP]
    tokens: torch.Tensor  # [1, C, frames]
    kept: torch.Tensor  # [frames], 0 or 1


class Pairs:
    """The training tracks but their variants: audio as it was tokenised, tokens, variations."""

    def __init__(
        self, music: Path, tokens: Path, variations: Path, codebooks: np.ndarray, frames: int
    ):
        """Of tracks with `frames` at least; tokens must be those of `codebooks` [C, V, d]."""
        manifest = read_manifest(tokens)
        codes = read_codebooks(tokens, manifest.codec)
        if codes.shape != codebooks.shape or not np.allclose(codes, codebooks, rtol=1e-2):
            sys.exit(f"{tokens} was made by another codec than the one to be trained")
        if not (variations / MADE_BY).exists():
            sys.exit(f"{variations / MADE_BY} does not exist; run vary_training_tracks.py first")
        if json.loads((variations / MADE_BY).read_text())["codec"] != manifest.codec.fingerprint:
            sys.exit(f"{variations} was made from tokens of another codec than {tokens} holds")
        originals = [t for t in choose_tracks(manifest, "train") if VARIANT not in t.name]
        originals, _ = long_enough(originals, frames, "training")
        self.frames = frames
        self.reader = TrackReader(tokens, manifest, originals)
        self.tracks = self.reader.tracks
        self.files = [music / f"{track.name}.wav" for track in self.tracks]
        index = json.loads((music / "index.json").read_text())
        self.gains = []
        for track, file in zip(self.tracks, self.files, strict=True):
            peak = max(
                float(np.abs(part).max()) for part in soundfile.blocks(file, 1 << 20, fill_value=0)
            )
            self.gains.append(min(10 ** ((-24 - index[track.name]["loudness"]) / 20), 1 / peak))
        for track in self.tracks:
            if not (variations / f"{track.name}.npy").exists():
                sys.exit(f"{variations} has no {track.name}; run vary_training_tracks.py again")
        self.varied = [np.load(variations / f"{t.name}.npy", mmap_mode="r") for t in self.tracks]
        self.weights = track_weights(
            [track.source for track in self.tracks], [track.seconds for track in self.tracks]
        )

    def draw(self, rng: np.random.Generator, varied: bool) -> Excerpt:
        """A random excerpt that is not silent."""
        while True:
            i = int(rng.choice(len(self.tracks), p=self.weights))
            start = int(rng.integers(self.tracks[i].frames - self.frames + 1))
            stop = start + self.frames
            audio, _ = soundfile.read(
                self.files[i], self.frames * HOP, start * HOP, dtype="float32", fill_value=0
            )
            if np.abs(audio[MARGIN * HOP : -MARGIN * HOP]).max() > 1e-3:
                break
        own = np.asarray(self.reader.read(i, start, stop)[0]).astype(np.int64)
        tokens = own
        if varied:
            tokens = np.asarray(self.varied[i][:, start:stop]).astype(np.int64)
        kept = (tokens == own).all(axis=0).astype(np.float32)
        audio = torch.from_numpy(audio * self.gains[i])[None, None]
        return Excerpt(audio, torch.from_numpy(tokens)[None], torch.from_numpy(kept))


@torch.no_grad()
def jumble(model: nn.Module, excerpt: Excerpt, rng: np.random.Generator) -> Excerpt:
    """Give every frame the tokens of the music moved by up to half a frame, of either polarity."""
    moved = [
        torch.roll(excerpt.audio, int(rng.integers(-HOP // 2, HOP // 2)), -1) * sign
        for sign in (1, -1, 1, -1)
    ]
    tokens = model.quantizer(model.encoder(torch.cat(moved)))[1]  # [4, C, frames]
    which = torch.from_numpy(rng.integers(0, len(moved), tokens.shape[-1]))
    chosen = tokens[which, :, torch.arange(len(which))].T[None]  # [1, C, frames]
    return Excerpt(excerpt.audio, chosen, torch.zeros_like(excerpt.kept))
