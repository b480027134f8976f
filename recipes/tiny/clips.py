"""What the recipe's measurements share: options, clips of a split, whether the same notes sound."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import librosa
import numpy as np
import soundfile

from vampnet_jax.evaluation.distances import SAMPLE_RATE, mel_distance
from vampnet_jax.training.checkpoints import read_run
from vampnet_jax.training.excerpts import choose_tracks, long_enough
from vampnet_jax.training.tokens import TrackReader, read_manifest

SECONDS = 10.0
"""Length of a clip."""


def options(
    doc: str, n_clips: int, *, model: bool = True, draws: bool = True
) -> argparse.ArgumentParser:
    """Those that measurements share.

    Args:
      doc: the script's docstring.
      n_clips: default of --clips.
      model: whether a model is measured.
      draws: whether anything is drawn at random.
    """
    parser = argparse.ArgumentParser(
        description=doc.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    if model:
        parser.add_argument("--model", default="tiny", help="name or directory")
    parser.add_argument("--music", type=Path, default=Path("data/music"))
    parser.add_argument("--split", type=Path, default=Path(__file__).parent / "split.json")
    parser.add_argument("--clips", type=int, default=n_clips, help="10 s clips per source")
    if draws:
        parser.add_argument("--seed", type=int, default=0)
    return parser


def chroma_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over frames (170 ms long) of the correlation of two clips' pitch-class profiles.

    1 is the same notes, 0 chance.
    """
    n = min(len(a), len(b))
    x, y = (
        librosa.feature.chroma_stft(y=clip[:n], sr=SAMPLE_RATE, n_fft=4096, hop_length=1024)
        for clip in (a, b)
    )
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    norms = np.linalg.norm(x, axis=0) * np.linalg.norm(y, axis=0)
    sounding = norms > 0
    return (
        float(((x * y).sum(axis=0)[sounding] / norms[sounding]).mean()) if sounding.any() else 0.0
    )


def compare(clip: np.ndarray, decoded: np.ndarray) -> tuple[float, float]:
    """Mel distance and chroma correlation of a clip `[samples]` and what was made of it."""
    return mel_distance(clip, decoded), chroma_correlation(clip, decoded)


def validation_tokens(run: Path, tokens: Path) -> tuple[TrackReader, int]:
    """The tracks of the validation split that are as long as a training run's window, in frames."""
    config, description = read_run(run)[:2]
    manifest = read_manifest(tokens)
    if description["codec"]["fingerprint"] != manifest.codec.fingerprint:
        sys.exit(f"{run} was trained on tokens of another codec than {tokens}")
    frame_rate = manifest.codec.sample_rate / manifest.codec.hop_length
    window = round(config.window_seconds * frame_rate)
    tracks, _ = long_enough(choose_tracks(manifest, "validation"), window, "validation")
    return TrackReader(tokens, manifest, tracks), window


def clips(
    music: Path, split: Path, part: str, per_source: int, seconds: float = SECONDS
) -> Iterator[tuple[str, np.ndarray]]:
    """(source, audio float32 `[samples]`) of evenly spaced places, at -24 LUFS per track.

    Args:
      music: folder that cache_music.py wrote.
      split: file that says which track belongs to which part.
      part: "train", "validation" or "test".
      per_source: how many.
      seconds: length of each; shorter tracks are left out.
    """
    for path in (music / "index.json", split):
        if not path.exists():
            sys.exit(f"{path} does not exist; recipes/tiny/README.md says how it is made")
    index = json.loads((music / "index.json").read_text())
    by_source: dict[str, list[str]] = {}
    for name in sorted(json.loads(split.read_text())[part]):
        if name in index and index[name]["seconds"] > seconds:
            by_source.setdefault(name.split("/")[0], []).append(name)
    for source, tracks in by_source.items():
        room = np.cumsum([index[name]["seconds"] - seconds for name in tracks])
        for place in (np.arange(per_source) + 0.5) / per_source * room[-1]:
            at = int(np.searchsorted(room, place, side="right"))
            start = int((place - (room[at - 1] if at else 0)) * SAMPLE_RATE)
            length = int(seconds * SAMPLE_RATE)
            audio, _ = soundfile.read(music / f"{tracks[at]}.wav", length, start, dtype="float32")
            gain = 10 ** ((-24 - index[tracks[at]]["loudness"]) / 20)
            yield source, audio * min(gain, 1 / max(float(np.abs(audio).max()), 1e-4))
