"""What the conditions make of some excerpts."""

import functools
import io
import math

import jax
import jax.numpy as jnp
import numpy as np
import soundfile

from codec_bridge import Codec
from codec_bridge import audio as signal
from codec_bridge.audio import Audio
from vampnet_jax.compression.coding import grid
from vampnet_jax.compression.compressor import Compressor
from vampnet_jax.evaluation.artefacts import seam_ranks, window_borders
from vampnet_jax.evaluation.conditions import Condition
from vampnet_jax.evaluation.distances import SAMPLE_RATE, Spectra
from vampnet_jax.evaluation.excerpts import Excerpt
from vampnet_jax.evaluation.token_scores import token_diversity
from vampnet_jax.pipeline import Clip
from vampnet_jax.prompts import Prompt
from vampnet_jax.release import Model
from vampnet_jax.vamping import independent, vamp, window_starts

_OPUS_MIN, _OPUS_MAX = 6.0, 256.0
"""kbit/s of a mono file that libsndfile's compression levels 1 and 0 ask for."""

VARIATION, SECOND_VARIATION, PROMPT, RANDOM_TOKENS, HIDDEN_TOKENS = range(5)
"""Streams of random numbers. All conditions draw the same ones, so that they differ by less."""

Rows = dict[str, np.ndarray]
"""Measure → float `[batch]`, or `[batch, d]` of an embedding."""


class Originals:
    """Some excerpts; what every condition needs of them is computed once, when first asked for."""

    def __init__(
        self, compressor: Compressor, excerpts: list[Excerpt], numbers: range, seed: int
    ) -> None:
        """
        Args:
          compressor: the model.
          excerpts: of which `numbers` are meant.
          seed: of what is drawn, which depends on it and on the excerpt's number.
        """
        self.numbers = numbers
        self._compressor, self._seed = compressor, seed
        self._excerpts = [excerpts[i] for i in numbers]

    @functools.cached_property
    def audio(self) -> np.ndarray:
        """float32 `[batch, samples]` at the codec's rate."""
        rate = self._compressor.model.codec.sample_rate
        return np.stack([excerpt.read(rate) for excerpt in self._excerpts])

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """int32 `[batch, C, T]`, the codebooks that the model speaks."""
        encoded = np.asarray(self._compressor.model.codec.encode(self.audio))
        return encoded[:, : self._compressor.n_codebooks]

    @functools.cached_property
    def spectra(self) -> list[Spectra]:
        """At 24 kHz."""
        return spectra(self.audio, self._compressor.model.codec)

    def keys(self, stream: int) -> jax.Array:
        """Random keys `[batch]`, others in each stream."""
        key = jax.random.fold_in(jax.random.key(self._seed), stream)
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(self.numbers))


def spectra(audio: np.ndarray, codec: Codec) -> list[Spectra]:
    """Of recordings `[batch, samples]` at the codec's rate."""
    at_24_khz = signal.resample(Audio(audio, codec.sample_rate), SAMPLE_RATE)
    return [Spectra(x) for x in at_24_khz.samples]


def make(
    compressor: Compressor, condition: Condition, originals: Originals
) -> tuple[np.ndarray, Rows]:
    """The recordings of a condition, float32 `[batch, samples]`, and what only it can tell."""
    codec, n_samples = compressor.model.codec, originals.audio.shape[1]
    if condition.kind == "opus":
        return _opus(originals.audio, codec.sample_rate, condition.kbps)
    rows: Rows = {}
    if condition.kind == "codec":
        tokens = originals.tokens[:, : condition.codebooks]
        bits = tokens.shape[1] * codec.frame_rate * math.log2(codec.codebook_size)
        rows["bitrate"] = np.full(len(tokens), bits)
    elif condition.kind == "random":
        shape, n_codes = originals.tokens.shape[1:], codec.codebook_size
        draw = jax.vmap(lambda key: jax.random.randint(key, shape, 0, n_codes))
        tokens = np.asarray(draw(originals.keys(RANDOM_TOKENS)))
    else:
        tokens, rows = _generate(compressor, condition, originals)
    made = np.asarray(codec.decode(tokens))[:, :n_samples]
    borders = _borders(compressor.model, tokens.shape[-1])
    if condition.kind in ("vamp", "compress", "fine") and borders:
        ranks = [seam_ranks(x, codec.sample_rate, codec.hop_length, borders) for x in made]
        rows["seam rank"] = np.array([r.mean() if r.size else np.nan for r in ranks])
    return made, rows


def _borders(model: Model, n_frames: int) -> list[int]:
    """Where windows of either stage meet."""
    coarse = [[start] for start in window_starts(n_frames, model.coarse_window)]
    fine = independent(window_starts(n_frames, model.fine_window), model.fine_window)
    return sorted(
        {
            *window_borders(coarse, model.coarse_window, n_frames),
            *window_borders(fine, model.fine_window, n_frames),
        }
    )


def _generate(
    compressor: Compressor, condition: Condition, originals: Originals
) -> tuple[np.ndarray, Rows]:
    """Tokens int32 `[batch, C, T]` of conditions in which the model has a part."""
    model, tokens = compressor.model, originals.tokens
    masks, rows = np.ones(tokens.shape, bool), Rows()
    if condition.kind == "fine":
        masks[:, : model.coarse.config.n_codebooks] = False
    elif condition.kind == "compress":
        keep = grid(condition.codebooks or tokens.shape[1], tokens.shape[-1], condition.period)
        masks[:, : len(keep)] = ~keep
        rows["bitrate"] = _bitrates(compressor, originals, keep, condition.period)
    else:
        masks = _prompted(model, condition.prompt, originals)
    options = model.coarse_sampling.changed(**dict(condition.sampling))

    def vamped(stream: int) -> np.ndarray:
        keys = originals.keys(stream)
        return np.asarray(vamp(model, jnp.asarray(tokens), jnp.asarray(masks), keys, options))

    made = vamped(VARIATION)
    n_generated = masks.sum((1, 2))
    same = ((made == tokens) & masks).sum((1, 2))
    rows["token accuracy"] = np.where(n_generated > 0, same / np.maximum(n_generated, 1), np.nan)
    if condition.kind == "vamp":
        rows["token diversity"] = np.full(len(tokens), np.nan)
        if originals.numbers.start == 0:  # a second variation of the first batch
            pairs = zip(made, vamped(SECOND_VARIATION), strict=True)
            rows["token diversity"] = np.array([token_diversity(np.stack(pair)) for pair in pairs])
    return made, rows


def _bitrates(
    compressor: Compressor, originals: Originals, keep: np.ndarray, period: int
) -> np.ndarray:
    """Bits per second `[batch]` of whole `.vnt` files."""
    n_samples = originals.audio.shape[1]
    clips = [Clip(tokens[None], n_samples) for tokens in originals.tokens]
    sizes = [len(compressor.compress(clip, keep, period=period)) for clip in clips]
    return 8 * np.array(sizes) / (n_samples / compressor.model.codec.sample_rate)


def _prompted(model: Model, prompt: Prompt, originals: Originals) -> np.ndarray:
    """bool `[batch, C, T]`, True = generate, from what each excerpt sounds like."""
    codec, shape = model.codec, originals.tokens.shape[1:]
    masks = []
    for audio, key in zip(originals.audio, originals.keys(PROMPT), strict=True):
        rhythm = None
        if prompt.onset or prompt.follows_beats:
            rhythm = prompt.listen(audio, codec.sample_rate, codec.hop_length)
        masks.append(prompt.mask(shape, key, frame_rate=codec.frame_rate, rhythm=rhythm))
    return np.stack([np.asarray(mask) for mask in masks])


def _opus(audio: np.ndarray, rate: int, kbps: float) -> tuple[np.ndarray, Rows]:
    """Through Ogg Opus files and back: float32 `[batch, samples]`, and the files' bitrates."""
    n_samples = audio.shape[1]
    level = 1 - (min(max(kbps, _OPUS_MIN), _OPUS_MAX) - _OPUS_MIN) / (_OPUS_MAX - _OPUS_MIN)
    made, bits = np.zeros(audio.shape, np.float32), np.zeros(len(audio))
    for i, samples in enumerate(signal.resample(Audio(audio, rate), 48_000).samples):
        buffer = io.BytesIO()
        with soundfile.SoundFile(
            buffer, "w", 48_000, 1, "OPUS", format="OGG", compression_level=level
        ) as file:
            file.write(samples)
        bits[i] = 8 * len(buffer.getvalue()) / (n_samples / rate)
        buffer.seek(0)
        decoded, _ = soundfile.read(buffer, dtype="float32")
        back = signal.resample(Audio(decoded[None], 48_000), rate).samples[0, :n_samples]
        made[i, : len(back)] = back
    return made, {"bitrate": bits}
