"""Measure tiny on the test split: codec, use of its codes, and losses of masked tokens.

Prints a Markdown table per topic, for the model card, and writes all figures as JSON.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from clips import clips, compare, options

import vampnet_jax as vampnet
from vampnet_jax.release import Model, Stage
from vampnet_jax.training.excerpts import choose_tracks, long_enough
from vampnet_jax.training.tokens import TrackReader, read_manifest
from vampnet_jax.training.validation import Validation, count_tokens, token_frequencies


def measure_codec(
    model: Model, audio: list[tuple[str, np.ndarray]]
) -> dict[str, tuple[float, float]]:
    """Mel distance and chroma correlation of reconstructions: all, and by source."""
    by_source: dict[str, list[tuple[float, float]]] = {"all": []}
    for source, clip in audio:
        decoded = np.asarray(model.codec.decode(model.codec.encode(clip[None])))[0]
        values = compare(clip, decoded)
        for name in ("all", source):
            by_source.setdefault(name, []).append(values)
    return {name: tuple(np.mean(values, axis=0).tolist()) for name, values in by_source.items()}


def perplexities(frequencies: np.ndarray) -> list[float]:
    """exp(entropy) of each codebook's usage `[C, V]`."""
    p = frequencies / frequencies.sum(axis=1, keepdims=True)
    return [float(x) for x in np.exp(-(p * np.log(np.maximum(p, 1e-12))).sum(axis=1))]


def measure_stage(
    stage: Stage,
    window: int,
    folder: Path,
    reader: TrackReader,
    frequencies: np.ndarray,
    count: int,
) -> dict[str, dict[str, float]]:
    """What `Validation.score` gives for the model, untrained, and for the unigram model."""
    tracks, _ = long_enough(reader.tracks, window, "test")
    reader = TrackReader(folder, reader.manifest, tracks)
    validation = Validation(reader, stage.config, window, count, 4)
    codebooks = stage.params["embedding"]["codebooks"]
    untrained = vampnet.init(jax.random.key(0), stage.config, codebooks)
    return {
        "untrained": validation.score(untrained),
        "unigram": validation.score_unigram(frequencies),
        "model": validation.score(stage.params),
    }


def main() -> None:
    parser = options(__doc__, n_clips=4, draws=False)
    parser.add_argument("--tokens", type=Path, default=Path("data/tokens"))
    parser.add_argument("--out", type=Path, default=Path("runs/evaluation.json"))
    parser.add_argument("--excerpts", type=int, default=96, help="windows for the losses")
    a = parser.parse_args()
    path = a.tokens / "manifest.json"
    if not path.exists():
        sys.exit(f"{path} does not exist; recipes/tiny/README.md says how it is made")
    model = vampnet.load(a.model)
    manifest = read_manifest(a.tokens)
    if manifest.codec.fingerprint != model.codec.fingerprint:
        sys.exit(f"{a.tokens} was made by another codec than that of {a.model}")
    audio = list(clips(a.music, a.split, "test", a.clips))
    result: dict = {"codec": measure_codec(model, audio)}
    print("\n| codec alone | mel distance | chroma correlation |\n|---|---|---|")
    for source, (distance, chroma) in result["codec"].items():
        print(f"| {source} | {distance:.3f} | {chroma:.2f} |")
    test = TrackReader(a.tokens, manifest, choose_tracks(manifest, "test"))
    train = TrackReader(a.tokens, manifest, choose_tracks(manifest, "train"))
    result["perplexity"] = {}
    for part, reader in (("test", test), ("training", train)):
        counts = count_tokens(reader)
        found = result["perplexity"][part] = perplexities(counts)
        print(f"\nPerplexity of each codebook over {counts[0].sum():.0f} {part} tokens:", end=" ")
        print(", ".join(f"{p:.0f}" for p in found))
    frequencies = token_frequencies(train)
    for name, stage, window in (
        ("coarse", model.coarse, model.coarse_window),
        ("fine", model.fine, model.fine_window),
    ):
        rows = measure_stage(stage, window, a.tokens, test, frequencies, a.excerpts)
        result[name] = rows
        print(f"\n| {name}, nats per masked token | untrained | unigram | model | margin |")
        print("|---|---|---|---|---|")
        for key in (k for k in rows["model"] if k.partition("/")[0] == "log_loss"):
            values = {who: scores[key] for who, scores in rows.items()}
            cells = " | ".join(f"{value:.3f}" for value in values.values())
            margin = values["unigram"] - values["model"]
            print(f"| {key.partition('/')[2] or 'all'} | {cells} | {margin:.3f} |")
        print(f"\n| {name}, accuracy | untrained | unigram | model |\n|---|---|---|---|")
        for key in ("top1/r<0.5", "top1/r>=0.5", "top25/r<0.5", "top25/r>=0.5"):
            print(f"| {key} | " + " | ".join(f"{row[key]:.1%}" for row in rows.values()) + " |")
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
