"""Make and measure recordings, batch by batch; what is done is kept and not done again.

The excerpts are numbered and measured in fixed batches, and every draw depends on the
seed and the excerpt's number: a run that is interrupted and resumed gives the same numbers.
"""

import concurrent.futures
import dataclasses
import io
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import soundfile

from codec_bridge import audio as signal
from codec_bridge.atomic import atomic_write
from codec_bridge.audio import Audio
from vampnet_jax.compression.coding import grid
from vampnet_jax.compression.compressor import Compressor
from vampnet_jax.evaluation.artefacts import clicks, seam_ranks
from vampnet_jax.evaluation.conditions import Condition
from vampnet_jax.evaluation.distances import SAMPLE_RATE, mel_distance, stft_distance
from vampnet_jax.evaluation.embeddings import EMBEDDINGS
from vampnet_jax.evaluation.excerpts import Excerpt
from vampnet_jax.evaluation.token_scores import score_tokens, token_diversity
from vampnet_jax.pipeline import Clip
from vampnet_jax.vamping import vamp, window_starts

BATCH = 4
"""Excerpts that are generated together."""
RATIOS = (0.25, 0.5, 0.75, 1.0)
"""Shares of masked tokens at which the models' predictions are scored."""
_OPUS_MIN, _OPUS_MAX = 6.0, 256.0

Rows = dict[str, np.ndarray]
"""Measure → float `[batch]`, or `[batch, d]` of an embedding."""


@dataclasses.dataclass(frozen=True, eq=False)
class Bench:
    """What is measured, and with what."""

    compressor: Compressor
    excerpts: list[Excerpt]
    reference: list[Excerpt]
    """As many others, which stand for real music in distances between sets."""
    embeddings: tuple[str, ...]
    seed: int
    folder: Path
    """Where measurements are kept."""
    n_listen: int
    """The first so many recordings of every condition are kept to be listened to."""

    def batches(self, excerpts: list[Excerpt]) -> list[range]:
        """Numbers of the excerpts of each batch."""
        n = len(excerpts)
        return [range(i, min(i + BATCH, n)) for i in range(0, n, BATCH)]


def measure(bench: Bench, condition: Condition, report: Callable[[], None]) -> Rows:
    """All measures of a condition, one row per excerpt; `report` is called after each batch."""

    def of(numbers: range) -> Rows:
        audio = read_batch(bench, bench.excerpts, numbers)
        tokens = np.asarray(bench.compressor.model.codec.encode(audio))[
            :, : bench.compressor.n_codebooks
        ]
        made, rows = _make(bench, condition, numbers, audio, tokens)
        _keep_to_listen(bench, condition.slug, numbers, made)
        return rows | _compare(bench, audio, made)

    return _kept(bench, condition.slug, bench.excerpts, of, report)


def measure_reference(bench: Bench, report: Callable[[], None]) -> Rows:
    """Embeddings of the reference excerpts."""

    def of(numbers: range) -> Rows:
        audio = _at_24_khz(bench, read_batch(bench, bench.reference, numbers))
        return {name: np.stack([EMBEDDINGS[name](x) for x in audio]) for name in bench.embeddings}

    return _kept(bench, "reference", bench.reference, of, report)


def measure_tokens(bench: Bench, report: Callable[[], None]) -> Rows:
    """What the models make of tokens that they have not seen, by share of masked tokens.

    Returns:
      `coarse/nll/0.5` and so on: nats per masked token and accuracy of the first window.
    """
    model = bench.compressor.model

    def of(numbers: range) -> Rows:
        tokens = np.asarray(model.codec.encode(read_batch(bench, bench.excerpts, numbers)))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.key(bench.seed), jnp.asarray(numbers)
        )
        rows: Rows = {}
        for name, stage, window in (
            ("coarse", model.coarse, model.coarse_window),
            ("fine", model.fine, model.fine_window),
        ):
            first = tokens[:, : stage.config.n_codebooks, :window]
            draws = jax.vmap(lambda key, s=first.shape[1:]: jax.random.uniform(key, s))(keys)
            for ratio in RATIOS:
                scores = score_tokens(stage, first, np.asarray(draws) < ratio)
                rows[f"{name}/nll/{ratio:g}"] = scores.nll
                rows[f"{name}/accuracy/{ratio:g}"] = scores.accuracy
        return rows

    return _kept(bench, "tokens", bench.excerpts, of, report)


def read_batch(bench: Bench, excerpts: list[Excerpt], numbers: range) -> np.ndarray:
    """float32 `[batch, samples]` at the codec's rate."""
    return np.stack([excerpts[i].read(bench.compressor.model.codec.sample_rate) for i in numbers])


def _make(
    bench: Bench, condition: Condition, numbers: range, audio: np.ndarray, tokens: np.ndarray
) -> tuple[np.ndarray, Rows]:
    """The recordings of a condition, float32 `[batch, samples]`, and what only it can tell."""
    model, n_samples = bench.compressor.model, audio.shape[1]
    codec = model.codec
    seconds = n_samples / codec.sample_rate
    if condition.kind == "opus":
        coded = [_opus(x, codec.sample_rate, condition.kbps) for x in audio]
        bits = np.array([8 * size / seconds for _, size in coded])
        return np.stack([x for x, _ in coded]), {"bitrate": bits}
    keep = np.ones(tokens.shape[1:], bool)
    rows: Rows = {}
    if condition.kind == "codec":
        n = condition.codebooks or tokens.shape[1]
        rate = n * codec.frame_rate * math.log2(codec.codebook_size)
        rows["bitrate"] = np.full(len(tokens), rate)
        return np.asarray(codec.decode(tokens[:, :n]))[:, :n_samples], rows
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(bench.seed), jnp.asarray(numbers))
    if condition.kind == "random":
        draw = jax.vmap(lambda k: jax.random.randint(k, tokens.shape[1:], 0, codec.codebook_size))
        return np.asarray(codec.decode(draw(keys)))[:, :n_samples], rows
    if condition.kind == "fine":
        keep[model.coarse.config.n_codebooks :] = False
        masks = np.broadcast_to(~keep, tokens.shape)
    elif condition.kind == "compress":
        n = min(condition.codebooks or len(keep), len(keep))
        grid_ = grid(n, tokens.shape[-1], condition.period)
        files = [
            bench.compressor.compress(Clip(x[None], n_samples), grid_, period=condition.period)
            for x in tokens
        ]
        rows["bitrate"] = np.array([8 * len(file) / seconds for file in files])
        keep[:] = False
        keep[:n] = grid_
        masks = np.broadcast_to(~keep, tokens.shape)
    else:
        masks = _prompted(bench, condition, audio, tokens, keys)
    options = model.coarse_sampling.changed(**dict(condition.sampling))
    made = np.asarray(vamp(model, jnp.asarray(tokens), jnp.asarray(masks), keys, options))
    generated = masks.sum((1, 2))
    same = ((made == tokens) & masks).sum((1, 2))
    rows["token accuracy"] = np.where(generated > 0, same / np.maximum(generated, 1), np.nan)
    rows["token diversity"] = np.full(len(tokens), np.nan)
    if numbers.start == 0 and condition.kind == "vamp":  # what a second variation differs by
        others = jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
        again = np.asarray(vamp(model, jnp.asarray(tokens), jnp.asarray(masks), others, options))
        rows["token diversity"] = np.array(
            [token_diversity(np.stack(pair)) for pair in zip(made, again, strict=True)]
        )
    sound = np.asarray(codec.decode(made))[:, :n_samples]
    borders = _borders(bench, tokens.shape[-1])
    if borders:
        ranks = [seam_ranks(x, codec.sample_rate, codec.hop_length, borders) for x in sound]
        rows["seam rank"] = np.array([r.mean() if r.size else np.nan for r in ranks])
    return sound, rows


def _borders(bench: Bench, n_frames: int) -> list[int]:
    """Frames at which a window's own tokens begin, after those it shares with the one before."""
    model = bench.compressor.model
    return sorted(
        {
            start + window
            for window in (model.coarse_window, model.fine_window)
            for start in window_starts(n_frames, window)[:-1]
        }
    )


def _prompted(
    bench: Bench, condition: Condition, audio: np.ndarray, tokens: np.ndarray, keys: jax.Array
) -> np.ndarray:
    """bool `[batch, C, T]`, True = generate, from what each excerpt sounds like."""
    codec = bench.compressor.model.codec
    masks = []
    for x, key in zip(audio, keys, strict=True):
        rhythm = None
        if condition.prompt.onset or condition.prompt.follows_beats:
            rhythm = condition.prompt.listen(x, codec.sample_rate, codec.hop_length)
        masks.append(
            condition.prompt.mask(
                tokens.shape[1:], jax.random.fold_in(key, 2), frame_rate=codec.frame_rate,
                rhythm=rhythm,
            )
        )  # fmt: skip
    return np.stack([np.asarray(mask) for mask in masks])


def _compare(bench: Bench, audio: np.ndarray, made: np.ndarray) -> Rows:
    """Distances to the excerpts, embeddings, clicks."""
    originals, others = _at_24_khz(bench, audio), _at_24_khz(bench, made)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = {
            "mel": np.array(list(pool.map(mel_distance, originals, others))),
            "stft": np.array(list(pool.map(stft_distance, originals, others))),
            "clicks": np.array([float(len(clicks(x, SAMPLE_RATE))) for x in others]),
        }
        for name in bench.embeddings:
            rows[name] = np.stack(list(pool.map(EMBEDDINGS[name], others)))
    return rows


def _at_24_khz(bench: Bench, audio: np.ndarray) -> np.ndarray:
    rate = bench.compressor.model.codec.sample_rate
    return signal.resample(Audio(audio, rate), SAMPLE_RATE).samples


def _opus(audio: np.ndarray, rate: int, kbps: float) -> tuple[np.ndarray, int]:
    """Through Opus and back: float32 `[samples]`, and the file's bytes."""
    level = 1 - (min(max(kbps, _OPUS_MIN), _OPUS_MAX) - _OPUS_MIN) / (_OPUS_MAX - _OPUS_MIN)
    at_48 = signal.resample(Audio(audio[None], rate), 48_000).samples[0]
    buffer = io.BytesIO()
    with soundfile.SoundFile(
        buffer, "w", 48_000, 1, "OPUS", format="OGG", compression_level=level
    ) as file:
        file.write(at_48)
    size = len(buffer.getvalue())
    buffer.seek(0)
    decoded, _ = soundfile.read(buffer, dtype="float32")
    back = signal.resample(Audio(decoded[None], 48_000), rate).samples[0]
    return np.pad(back[: len(audio)], (0, max(0, len(audio) - len(back)))), size


def _kept(
    bench: Bench,
    name: str,
    excerpts: list[Excerpt],
    of: Callable[[range], Rows],
    report: Callable[[], None],
) -> Rows:
    """The rows of all batches, computed where they are not there yet."""
    parts = []
    for number, numbers in enumerate(bench.batches(excerpts)):
        path = bench.folder / "measurements" / f"{name}-{number:04d}.npz"
        if not path.is_file():
            rows = of(numbers)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as temporary, open(temporary, "wb") as file:
                arrays: dict[str, Any] = dict(rows)
                np.savez(file, **arrays)
        with np.load(path, allow_pickle=False) as kept:
            parts.append({key: kept[key] for key in kept.files})
        report()
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _keep_to_listen(bench: Bench, name: str, numbers: range, made: np.ndarray) -> None:
    rate = bench.compressor.model.codec.sample_rate
    folder = bench.folder / "audio"
    for number, samples in zip(numbers, made, strict=True):
        if number < bench.n_listen:
            folder.mkdir(parents=True, exist_ok=True)
            audio = Audio(np.clip(samples, -1, 1)[None], rate)
            signal.write(folder / f"{name}-{number}.flac", audio, overwrite=True)


def keep_originals(bench: Bench) -> None:
    """The excerpts themselves, to be listened to beside what was made of them."""
    if bench.n_listen:
        numbers = range(min(bench.n_listen, len(bench.excerpts)))
        _keep_to_listen(bench, "original", numbers, read_batch(bench, bench.excerpts, numbers))
