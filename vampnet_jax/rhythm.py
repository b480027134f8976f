"""Rhythm as a prompt: onsets and beats found in audio by librosa, and masks that keep them.

Finding needs audio and runs on the host; the masks are pure functions of frame numbers, like
those of `vampnet_jax.masks`. Source: VampNet, section 3.2 (beat-driven prompts).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vampnet_jax import masks

BEATS_PER_BAR = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Rhythm:
    """Where something starts, in codec frames, ascending."""

    onsets: np.ndarray
    """int `[n]`: notes and hits, moved back to where their energy begins to rise."""
    beats: np.ndarray
    """int `[m]`."""
    downbeats: np.ndarray
    """bool `[m]`: which beats open a bar."""


def find_onsets(audio: np.ndarray, sample_rate: int, hop_length: int) -> np.ndarray:
    """Find onsets and backtrack each to the minimum of energy before it.

    Args:
      audio: float `[samples]`, mono.
      sample_rate: in Hz.
      hop_length: samples per codec frame.

    Returns:
      int `[n]`, codec frames; empty for silence.
    """
    import librosa

    envelope = _onset_strength(audio, sample_rate, hop_length)
    if not envelope.any():
        return np.zeros(0, int)
    found = librosa.onset.onset_detect(
        onset_envelope=envelope, sr=sample_rate, hop_length=hop_length, backtrack=True
    )
    return np.unique(np.asarray(found, int))


def find_beats(
    audio: np.ndarray, sample_rate: int, hop_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Track beats (Ellis 2007) and guess which open a bar.

    librosa knows no bars. A bar is taken to have four beats, and of the four ways to count the one
    whose first beats have the strongest onsets on average is chosen; music in three is
    therefore mistaken for music in four.

    Args:
      audio: float `[samples]`, mono.
      sample_rate: in Hz.
      hop_length: samples per codec frame.

    Returns:
      int `[m]`, codec frames, and bool `[m]`, True at downbeats; both empty for silence.
    """
    import librosa

    envelope = _onset_strength(audio, sample_rate, hop_length)
    if not envelope.any():
        return np.zeros(0, int), np.zeros(0, bool)
    _, found = librosa.beat.beat_track(
        onset_envelope=envelope, sr=sample_rate, hop_length=hop_length, trim=False
    )
    beats = np.unique(np.asarray(found, int))
    # A beat may be tracked one frame beside the peak of its onset.
    around = np.clip(beats[:, None] + np.arange(-1, 2), 0, len(envelope) - 1)
    strength = envelope[around].max(axis=1) if len(beats) else np.zeros(0)
    phases = range(min(BEATS_PER_BAR, len(beats)))
    first = max(phases, key=lambda phase: strength[phase::BEATS_PER_BAR].mean(), default=0)
    return beats, np.arange(len(beats)) % BEATS_PER_BAR == first


def onset(shape: masks.Shape, onsets: np.ndarray | jax.Array, width: int) -> jax.Array:
    """Keep frames `[i − width, i + width)` around each onset i, as far as they exist.

    Args:
      shape: `(..., C, T)`.
      onsets: int `[n]`, frames.
      width: frames on each side.
    """
    return _keep_spans(shape, jnp.asarray(onsets) - width, jnp.asarray(onsets) + width)


def beat(
    shape: masks.Shape,
    beats: np.ndarray | jax.Array,
    before: int,
    after: int,
    *,
    key: jax.Array | None = None,
    dropout: float = 0.0,
) -> jax.Array:
    """Keep frames `[i − before, i + after)` around each beat i, as far as they exist.

    Args:
      shape: `(..., C, T)`.
      beats: int `[m]`, frames; leave out those that should not count (see `choose_beats`).
      before, after: frames.
      key: needed with dropout.
      dropout: chance that a beat is left out.
    """
    beats = jnp.asarray(beats)
    kept = None
    if dropout:
        if key is None:
            raise ValueError("dropout of beats needs a key")
        kept = jax.random.uniform(key, beats.shape) >= dropout
    return _keep_spans(shape, beats - before, beats + after, kept)


def choose_beats(rhythm: Rhythm, downbeats_only: bool = False, every: int = 1) -> np.ndarray:
    """Frames of the beats to follow: all or downbeats only, and of these every n-th."""
    beats = rhythm.beats[rhythm.downbeats] if downbeats_only else rhythm.beats
    return beats[::every]


def _onset_strength(audio: np.ndarray, sample_rate: int, hop_length: int) -> np.ndarray:
    import librosa

    # One analysis window (2048 samples) is the least that librosa takes.
    audio = np.pad(audio, (0, max(0, 2048 - len(audio))))
    return librosa.onset.onset_strength(y=audio, sr=sample_rate, hop_length=hop_length)


def _keep_spans(
    shape: masks.Shape, starts: jax.Array, stops: jax.Array, kept: jax.Array | None = None
) -> jax.Array:
    """Keep half-open spans of frames, clipped at both ends; `kept` says which of them count."""
    n_frames = shape[-1]
    change = jnp.ones(starts.shape, jnp.int32) if kept is None else kept.astype(jnp.int32)
    depth = jnp.zeros(n_frames + 1, jnp.int32)
    depth = depth.at[jnp.clip(starts, 0, n_frames)].add(change)
    depth = depth.at[jnp.clip(stops, 0, n_frames)].add(-change)
    covered = jnp.cumsum(depth)[:-1] > 0
    return jnp.broadcast_to(jnp.expand_dims(~covered, tuple(range(len(shape) - 1))), tuple(shape))
