"""Distances between one recording and another of the same length: mel and STFT spectra."""

import functools

import numpy as np

SAMPLE_RATE = 24_000
"""All distances are taken at this rate, in Hz, mono."""
MEL_WINDOWS = ((2048, 150), (512, 80))
"""(window, mel bands) of the mel distance."""
STFT_WINDOWS = (2048, 1024, 512, 256, 128)
FLOOR = 1e-5


class Spectra:
    """A recording's magnitude spectra; those of each window are computed when first asked for."""

    def __init__(self, audio: np.ndarray) -> None:
        """Of float `[samples]` at 24 kHz."""
        self.audio = np.asarray(audio, np.float32)
        self._magnitudes: dict[int, np.ndarray] = {}

    def magnitudes(self, window: int) -> np.ndarray:
        """float32 `[1 + window // 2, frames]`: Hann windows, a quarter of their length apart."""
        if window not in self._magnitudes:
            import librosa

            padded = np.pad(self.audio, (0, max(0, window - len(self.audio))))
            spectrum = librosa.stft(padded, n_fft=window, hop_length=window // 4)
            self._magnitudes[window] = np.abs(spectrum)
        return self._magnitudes[window]

    def log_mel(self, window: int, bands: int) -> np.ndarray:
        """log10 mel magnitudes, float32 `[bands, frames]`."""
        return np.log10(np.maximum(_filters(window, bands) @ self.magnitudes(window), FLOOR))

    def mel_distance(self, other: "Spectra") -> float:
        """As the function `mel_distance`, to a recording of the same length."""
        return sum(
            float(np.abs(self.log_mel(*sizes) - other.log_mel(*sizes)).mean())
            for sizes in MEL_WINDOWS
        )

    def stft_distance(self, other: "Spectra") -> float:
        """As the function `stft_distance`, from this reference to one of the same length."""
        total = 0.0
        for window in STFT_WINDOWS:
            a, b = self.magnitudes(window), other.magnitudes(window)
            difference, size = float(np.linalg.norm(a - b)), float(np.linalg.norm(a))
            total += difference / max(size, FLOOR) if difference else 0.0
            total += float(np.abs(_log(a) - _log(b)).mean())
        return total / len(STFT_WINDOWS)


def mel_distance(reference: np.ndarray, other: np.ndarray) -> float:
    """Sum over `MEL_WINDOWS` of the mean |difference| of log10 mel magnitudes.

    Args:
      reference, other: float `[samples]` at 24 kHz; the longer one is cut.

    Returns:
      0 for equal recordings; about 0.3 for Opus at 12 kbit/s.

    Source: VampNet, section 4 (librosa's Hann STFT with a hop of a quarter window, magnitudes,
    Slaney mel filters, clamped at 1e-5).
    """
    a, b = _alike(reference, other)
    return a.mel_distance(b)


def stft_distance(reference: np.ndarray, other: np.ndarray) -> float:
    """Multi-resolution STFT distance: mean over windows of spectral convergence plus log magnitude.

    Spectral convergence is ‖|A| − |B|‖ / ‖|A|‖ (of the reference; 0 if both are silent), the log
    magnitude term the mean |difference| of natural logs, clamped at 1e-5.

    Args:
      reference, other: float `[samples]` at 24 kHz; the longer one is cut.

    Source: Yamamoto et al. 2020 (Parallel WaveGAN), section 2.2; windows of 128 to 2048 samples.
    """
    a, b = _alike(reference, other)
    return a.stft_distance(b)


def _alike(a: np.ndarray, b: np.ndarray) -> tuple[Spectra, Spectra]:
    if a.ndim != 1 or b.ndim != 1 or not min(len(a), len(b)):
        raise ValueError(f"recordings are {a.shape} and {b.shape}; [samples] is needed")
    n = min(len(a), len(b))
    return Spectra(a[:n]), Spectra(b[:n])


def _log(magnitudes: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(magnitudes, FLOOR))


@functools.lru_cache
def _filters(window: int, bands: int) -> np.ndarray:
    import librosa

    return librosa.filters.mel(sr=SAMPLE_RATE, n_fft=window, n_mels=bands)
