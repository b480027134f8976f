"""Loudness by codec frame, and from it the loudness of any excerpt (ITU-R BS.1770-4).

Kept with the tokens, it lets training leave out quiet excerpts without the audio.
"""

import math

import numpy as np
import pyloudnorm

OFFSET = -0.691  # dB, BS.1770: K-weighted mean square 1 is −0.691 LUFS
BLOCK_SECONDS = 0.4
STEP_SECONDS = 0.1
ABSOLUTE_GATE = -70.0  # LUFS
RELATIVE_GATE = -10.0  # LU under the mean of what passed the absolute gate


def k_weight(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    """The K-weighting of BS.1770 (a high shelf, then a high-pass) of mono audio `[samples]`."""
    shelf = pyloudnorm.IIRfilter(4.0, 1 / math.sqrt(2), 1500.0, sample_rate, "high_shelf")
    high_pass = pyloudnorm.IIRfilter(0.0, 0.5, 38.0, sample_rate, "high_pass")
    return high_pass.apply_filter(shelf.apply_filter(audio))


def frame_loudness(audio: np.ndarray, sample_rate: int, hop_length: int) -> np.ndarray:
    """Ungated loudness of every frame of mono audio `[samples]`: LUFS `[⌈samples / hop⌉]`.

    Silence is −∞; the last frame is measured over the samples that it has.
    """
    power = np.square(k_weight(np.asarray(audio, np.float64), sample_rate))
    starts = np.arange(0, len(power), hop_length)
    counts = np.diff(np.append(starts, len(power)))
    with np.errstate(divide="ignore"):
        mean = np.add.reduceat(power, starts) / counts if len(power) else power
        return (OFFSET + 10 * np.log10(mean)).astype(np.float32)


def excerpt_loudness(frames: np.ndarray, frame_rate: float) -> float:
    """Integrated loudness in LUFS of consecutive frames, gated as BS.1770 gates audio.

    Blocks are the nearest whole number of frames to 0.4 s, one each 0.1 s. −∞ when nothing is
    louder than −70 LUFS; an excerpt shorter than a block is one block.
    """
    power = 10 ** ((frames.astype(np.float64) - OFFSET) / 10)
    size = min(max(1, round(BLOCK_SECONDS * frame_rate)), len(power))
    step = max(1, round(STEP_SECONDS * frame_rate))
    sums = np.concatenate([[0.0], np.cumsum(power)])
    blocks = ((sums[size:] - sums[:-size]) / size)[::step]
    gate = 10 ** ((ABSOLUTE_GATE - OFFSET) / 10)
    blocks = blocks[blocks > gate]
    if not len(blocks):
        return -math.inf
    blocks = blocks[blocks > blocks.mean() * 10 ** (RELATIVE_GATE / 10)]
    return OFFSET + 10 * math.log10(blocks.mean())
