"""What generated audio must not have: clicks, and seams where windows meet."""

import itertools

import numpy as np

CLICK_FACTOR = 30.0
SEAM_REACH = 2


def clicks(audio: np.ndarray, rate: int, factor: float = CLICK_FACTOR) -> np.ndarray:
    """Times of isolated jumps in the signal, in seconds.

    A click is a sample whose second difference is `factor` times the median of those within 5 ms
    around it, and above −60 dB of full scale. Attacks of instruments last longer than that.

    Args:
      audio: float `[samples]`.
      rate: in Hz.
    """
    bend = np.abs(np.diff(audio.astype(np.float64), n=2))
    half = max(8, round(0.005 * rate))
    if len(bend) <= 2 * half:
        return np.zeros(0)
    found: list[int] = []
    # The median of each stretch of 5 ms; an event is compared with both neighbours' as well.
    n = len(bend) // half
    medians = np.median(bend[: n * half].reshape(n, half), axis=1)
    around = np.max([np.roll(medians, -1), medians, np.roll(medians, 1)], axis=0)
    limit = np.maximum(factor * np.repeat(around, half), 1e-3)
    above = np.flatnonzero(bend[: n * half] > limit)
    for sample in above:
        if not found or sample - found[-1] > half:
            found.append(int(sample))
    return (np.array(found, float) + 1) / rate


def window_borders(passes: list[list[int]], window: int, n_frames: int) -> list[int]:
    """Frames at which a sequence goes from what one window made to what another one did.

    Args:
      passes: first frames of windows, in the order in which they are made: earlier ones keep what
        they share with later ones.
      window: frames of each.
      n_frames: of the sequence.
    """
    maker = np.full(n_frames, -1)
    for start in itertools.chain.from_iterable(passes):
        span = maker[start : start + window]
        span[span < 0] = start
    return [int(frame) + 1 for frame in np.flatnonzero(np.diff(maker))]


def seam_ranks(audio: np.ndarray, rate: int, hop: int, borders: list[int]) -> np.ndarray:
    """How unusual the places are at which windows meet.

    At every border the largest change of level, and of spectrum, within ±2 frames is ranked among
    all places of the recording.

    Args:
      audio: float `[samples]`.
      rate: in Hz.
      hop: samples per frame.
      borders: frames at which a window takes over.

    Returns:
      float `[2, n]`, level and spectral flux at the borders that lie inside: the share of places
      that change less. Places at random have ½ on average.
    """
    import librosa

    rms = librosa.feature.rms(y=audio, frame_length=2 * hop, hop_length=hop)[0]
    level = 20 * np.log10(np.maximum(rms, 1e-5))
    measures = (
        np.abs(np.diff(level, prepend=level[:1])),
        librosa.onset.onset_strength(y=audio, sr=rate, hop_length=hop, center=True),
    )
    ranks = []
    for values in measures:
        if len(values) <= 2 * SEAM_REACH:
            return np.zeros((2, 0))
        nearby = np.lib.stride_tricks.sliding_window_view(values, 2 * SEAM_REACH + 1).max(axis=1)
        inside = [b - SEAM_REACH for b in borders if 0 <= b - SEAM_REACH < len(nearby)]
        ranks.append(
            [((nearby < nearby[b]).mean() + (nearby <= nearby[b]).mean()) / 2 for b in inside]
        )
    return np.array(ranks)
