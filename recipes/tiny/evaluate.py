"""Measure tiny on the test split: codec, masked-token losses, and how far variations stray.

Prints a Markdown table per topic, for the model card, and writes all figures as JSON. Mel distance
is the sum over (window, mels) of (2048, 150) and (512, 80) of the mean |difference| of log10 mel
magnitudes at 24 kHz, hop = window/4, clamped at 1e-5 (about that of VampNet, section 4). Chroma
correlation says whether the same notes sound: 1 is the same, 0 is chance.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import librosa
import numpy as np
import soundfile

import vampnet_jax as vampnet
from vampnet_jax.prompts import preset
from vampnet_jax.release import Model, Stage
from vampnet_jax.training.excerpts import choose_tracks, long_enough
from vampnet_jax.training.tokens import TrackReader, read_manifest
from vampnet_jax.training.validation import Validation, token_frequencies

SAMPLE_RATE = 24_000


def log_mel(audio: np.ndarray, window: int, mels: int) -> np.ndarray:
    """log10 of mel magnitudes, `[mels, frames]`."""
    mel = librosa.feature.melspectrogram(
        y=audio,
        sr=SAMPLE_RATE,
        n_fft=window,
        hop_length=window // 4,
        n_mels=mels,
        power=1.0,
    )
    return np.log10(np.maximum(mel, 1e-5))


def mel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Between two mono clips at 24 kHz; the longer one is cut."""
    n = min(len(a), len(b))
    pairs = [(log_mel(a[:n], *s), log_mel(b[:n], *s)) for s in ((2048, 150), (512, 80))]
    return float(sum(np.abs(x - y).mean() for x, y in pairs))


def chroma_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over frames (170 ms long) of the correlation of two clips' pitch-class profiles."""
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


def clips(
    music: Path, names: list[str], index: dict, per_source: int, seconds: float
) -> Iterator[tuple[str, np.ndarray]]:
    """(source, audio float32 `[samples]`) of evenly spaced places, at -24 LUFS per track."""
    by_source: dict[str, list[str]] = {}
    for name in sorted(names):
        if index[name]["seconds"] > seconds:
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


def measure_codec(
    model: Model, audio: list[tuple[str, np.ndarray]]
) -> dict[str, tuple[float, float]]:
    """Mel distance and chroma correlation of reconstructions: all, and by source."""
    by_source: dict[str, list[tuple[float, float]]] = {"all": []}
    for source, clip in audio:
        decoded = np.asarray(model.codec.decode(model.codec.encode(clip[None])))[0]
        values = mel_distance(clip, decoded), chroma_correlation(clip, decoded)
        for name in ("all", source):
            by_source.setdefault(name, []).append(values)
    return {name: tuple(np.mean(values, axis=0).tolist()) for name, values in by_source.items()}


def perplexities(frequencies: np.ndarray) -> list[float]:
    """exp(entropy) of each codebook's usage `[C, V]`."""
    p = frequencies / frequencies.sum(axis=1, keepdims=True)
    return [float(x) for x in np.exp(-(p * np.log(np.maximum(p, 1e-12))).sum(axis=1))]


def count_codes(reader: TrackReader) -> np.ndarray:
    """How often each code occurs, `[C, V]`."""
    codec = reader.manifest.codec
    counts = np.zeros((codec.n_codebooks, codec.codebook_size))
    for i, track in enumerate(reader.tracks):
        for codebook, row in enumerate(reader.read(i, 0, track.frames)[0]):
            counts[codebook] += np.bincount(row, minlength=codec.codebook_size)
    return counts


def measure_stage(
    stage: Stage,
    window: int,
    folder: Path,
    reader: TrackReader,
    frequencies: np.ndarray,
    count: int,
) -> dict[str, dict[str, float]]:
    """Nats per masked token of the model and of the unigram model, all and by source."""
    tracks, _ = long_enough(reader.tracks, window, "test")
    reader = TrackReader(folder, reader.manifest, tracks)
    validation = Validation(reader, stage.config, window, count, 4)
    return {
        "model": validation.score(stage.params),
        "unigram": validation.score_unigram(frequencies),
    }


def measure_variations(
    model: Model, audio: list[tuple[str, np.ndarray]], seed: int
) -> dict[str, tuple[float, float]]:
    """Mel distance and chroma correlation with the input: variations by preset, random tokens."""
    measured: dict[str, list[tuple[float, float]]] = {}
    codec = model.codec
    for number, (_, clip) in enumerate(audio):
        tokens = codec.encode(clip[None])
        made = {"codec alone": tokens}
        for name in ("small-variation", "medium-variation", "large-variation"):
            key = jax.random.fold_in(jax.random.key(seed), number)
            frame_rate = codec.sample_rate / codec.hop_length
            mask = preset(name).mask(tokens.shape, key, frame_rate=frame_rate)
            made[name] = vampnet.vamp(model, tokens, mask, key)
        rng = np.random.default_rng((seed, number))
        made["random tokens"] = rng.integers(0, codec.codebook_size, tokens.shape, np.int32)
        for name, new in made.items():
            decoded = np.asarray(codec.decode(new))[0]
            values = mel_distance(clip, decoded), chroma_correlation(clip, decoded)
            measured.setdefault(name, []).append(values)
    return {name: tuple(np.mean(values, axis=0).tolist()) for name, values in measured.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="name or directory")
    parser.add_argument("--music", type=Path, default=Path("data/music"))
    parser.add_argument("--tokens", type=Path, default=Path("data/tokens"))
    parser.add_argument("--split", type=Path, default=Path(__file__).parent / "split.json")
    parser.add_argument("--out", type=Path, default=Path("runs/evaluation.json"))
    parser.add_argument("--clips", type=int, default=4, help="10 s clips per source")
    parser.add_argument("--varied", type=int, default=2, help="of these clips, how many to vary")
    parser.add_argument("--excerpts", type=int, default=96, help="windows for the losses")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    for path in (a.music / "index.json", a.tokens / "manifest.json", a.split):
        if not path.exists():
            sys.exit(f"{path} does not exist; recipes/tiny/README.md says how it is made")
    index = json.loads((a.music / "index.json").read_text())
    names = [name for name in json.loads(a.split.read_text())["test"] if name in index]
    model = vampnet.load(a.model)
    manifest = read_manifest(a.tokens)
    if manifest.codec.fingerprint != model.codec.fingerprint:
        sys.exit(f"{a.tokens} was made by another codec than that of {a.model}")
    audio = list(clips(a.music, names, index, a.clips, 10.0))
    result: dict = {"codec": measure_codec(model, audio)}
    print("\n| codec alone | mel distance | chroma correlation |\n|---|---|---|")
    for source, (distance, chroma) in result["codec"].items():
        print(f"| {source} | {distance:.3f} | {chroma:.2f} |")
    test = TrackReader(a.tokens, manifest, choose_tracks(manifest, "test"))
    counts = count_codes(test)
    result["perplexity"] = perplexities(counts)
    print(f"\nPerplexity of each codebook over {counts[0].sum():.0f} test tokens:", end=" ")
    print(", ".join(f"{p:.0f}" for p in result["perplexity"]))
    train = TrackReader(a.tokens, manifest, choose_tracks(manifest, "train"))
    frequencies = token_frequencies(train)
    for name, stage, window in (
        ("coarse", model.coarse, model.coarse_window),
        ("fine", model.fine, model.fine_window),
    ):
        rows = measure_stage(stage, window, a.tokens, test, frequencies, a.excerpts)
        result[name] = rows
        print(f"\n| {name}, nats per masked token | unigram | model | margin |\n|---|---|---|---|")
        for key, unigram in rows["unigram"].items():
            own = rows["model"][key]
            source = key.partition("/")[2] or "all"
            print(f"| {source} | {unigram:.3f} | {own:.3f} | {unigram - own:.3f} |")
        accuracies = {k: round(v, 4) for k, v in rows["model"].items() if k.startswith("top")}
        print(f"accuracies: {accuracies}")
    varied = [clip for i, clip in enumerate(audio) if i % a.clips < a.varied]
    result["variations"] = measure_variations(model, varied, a.seed)
    print("\n| | mel distance to the input | chroma correlation |\n|---|---|---|")
    for name, (distance, chroma) in result["variations"].items():
        print(f"| {name} | {distance:.3f} | {chroma:.2f} |")
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
