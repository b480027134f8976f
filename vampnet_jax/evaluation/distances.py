"""Distances between one recording and another of the same length: mel and STFT spectra."""

import functools

import numpy as np

SAMPLE_RATE = 24_000
"""All distances are taken at this rate, in Hz, mono."""
MEL_WINDOWS = ((2048, 150), (512, 80))
"""(window, mel bands) of the mel distance."""
STFT_WINDOWS = (2048, 1024, 512, 256, 128)
FLOOR = 1e-5


def mel_distance(reference: np.ndarray, other: np.ndarray) -> float:
    """Sum over `MEL_WINDOWS` of the mean |difference| of log10 mel magnitudes.

    Args:
      reference, other: float `[samples]` at 24 kHz; the longer one is cut.

    Returns:
      0 for equal recordings; about 0.3 for Opus at 12 kbit/s.

    Source: VampNet, section 4 (librosa's Hann STFT with a hop of a quarter window, magnitudes,
    Slaney mel filters, clamped at 1e-5).
    """
    reference, other = _alike(reference, other)
    total = 0.0
    for window, bands in MEL_WINDOWS:
        a, b = (log_mel(x, window, bands) for x in (reference, other))
        total += float(np.abs(a - b).mean())
    return total


def log_mel(audio: np.ndarray, window: int, bands: int) -> np.ndarray:
    """log10 mel magnitudes, float32 `[bands, frames]`, of `[samples]` at 24 kHz."""
    return np.log10(np.maximum(_filters(window, bands) @ _magnitudes(audio, window), FLOOR))


def stft_distance(reference: np.ndarray, other: np.ndarray) -> float:
    """Multi-resolution STFT distance: mean over windows of spectral convergence plus log magnitude.

    Spectral convergence is ‖|A| − |B|‖ / ‖|A|‖ (of the reference; 0 if both are silent), the log
    magnitude term the mean |difference| of natural logs, clamped at 1e-5.

    Args:
      reference, other: float `[samples]` at 24 kHz; the longer one is cut.

    Source: Yamamoto et al. 2020 (Parallel WaveGAN), section 2.2; windows of 128 to 2048 samples.
    """
    reference, other = _alike(reference, other)
    total = 0.0
    for window in STFT_WINDOWS:
        a, b = (_magnitudes(x, window) for x in (reference, other))
        difference, size = float(np.linalg.norm(a - b)), float(np.linalg.norm(a))
        total += difference / max(size, FLOOR) if difference else 0.0
        total += float(np.abs(np.log(np.maximum(a, FLOOR)) - np.log(np.maximum(b, FLOOR))).mean())
    return total / len(STFT_WINDOWS)


def _alike(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if a.ndim != 1 or b.ndim != 1 or not min(len(a), len(b)):
        raise ValueError(f"recordings are {a.shape} and {b.shape}; [samples] is needed")
    n = min(len(a), len(b))
    return a[:n], b[:n]


def _magnitudes(audio: np.ndarray, window: int) -> np.ndarray:
    import librosa

    short = max(0, window - len(audio))
    padded = np.pad(np.asarray(audio, np.float32), (0, short))
    return np.abs(librosa.stft(padded, n_fft=window, hop_length=window // 4))


@functools.lru_cache
def _filters(window: int, bands: int) -> np.ndarray:
    import librosa

    return librosa.filters.mel(sr=SAMPLE_RATE, n_fft=window, n_mels=bands)
