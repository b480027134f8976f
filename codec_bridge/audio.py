"""Audio files and signals: read, write, resample, loudness, gain and pitch."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from codec_bridge.atomic import atomic_write
from codec_bridge.errors import InputError

MAX_CHANNELS = 32
MIN_RATE, MAX_RATE = 1_000, 768_000
MAX_VALUES = 2**30  # samples times channels; 4 GiB in memory, over three hours of CD audio
MAX_SEMITONES = 12.0
_BLOCK = 1 << 16  # frames read or written at a time

# File name extension -> (container, encodings it takes, the first being the default).
FORMATS: dict[str, tuple[str, tuple[str, ...]]] = {
    ".wav": ("WAV", ("PCM_16", "PCM_24", "FLOAT")),
    ".flac": ("FLAC", ("PCM_16", "PCM_24")),
    ".ogg": ("OGG", ("VORBIS",)),
    ".opus": ("OGG", ("OPUS",)),
    ".mp3": ("MP3", ("MPEG_LAYER_III",)),
}
# Rates in Hz that lossy encoders take; other audio is resampled to the next one above.
_RATES = {
    "OPUS": (8000, 12000, 16000, 24000, 48000),
    "MPEG_LAYER_III": (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000),
}


@dataclass(frozen=True)
class Audio:
    """A signal in memory.

    Attributes:
      samples: float32 [channels, n], full scale at ±1.
      rate: samples per second, in Hz.
    """

    samples: np.ndarray
    rate: int

    @property
    def channels(self) -> int:
        return self.samples.shape[0]

    @property
    def seconds(self) -> float:
        return self.samples.shape[1] / self.rate


def read(path: str | os.PathLike[str], *, max_values: int = MAX_VALUES) -> Audio:
    """Read a WAV, FLAC, Ogg Vorbis, Opus, MP3 or any other file that libsndfile knows.

    Args:
      max_values: largest number of samples times channels; checked before decoding.

    Raises:
      InputError: no such file, not audio, damaged, too long, an unreasonable rate or number of
        channels, no samples, or samples that are not finite.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"there is no file {path}")
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty")
        if path.suffix.lower() == ".raw":
            raise InputError(f"{path} is headerless audio; convert it to WAV first")
        with soundfile.SoundFile(path) as file:
            _check_header(path, file, max_values)
            samples = np.empty((file.channels, file.frames), np.float32)
            filled = 0
            for block in file.blocks(_BLOCK, dtype="float32", always_2d=True):
                block = block[: samples.shape[1] - filled]
                samples[:, filled : filled + len(block)] = block.T
                filled += len(block)
            rate = file.samplerate
    except soundfile.LibsndfileError as error:
        raise InputError(f"{path} cannot be read as audio: {error.error_string}") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    if filled == 0:
        raise InputError(f"{path} has no samples")
    samples = samples[:, :filled]
    if not np.isfinite(samples).all():
        raise InputError(f"{path} has samples that are not finite (NaN or infinity)")
    return Audio(samples, rate)


def write(
    path: str | os.PathLike[str],
    audio: Audio,
    *,
    encoding: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write an audio file, whole or not at all; the format follows from the extension.

    Opus and MP3 know some sampling rates only: other audio is resampled to the next one above.
    Samples beyond ±1 are clipped, except in WAV files of encoding FLOAT.

    Args:
      path: ends in .wav, .flac, .ogg (Vorbis), .opus or .mp3.
      encoding: "PCM_16" (the default of WAV and FLAC), "PCM_24", or "FLOAT" (WAV).
      overwrite: replace a file that exists.

    Raises:
      InputError: an unknown extension or encoding, no samples or samples that are not finite, or
        a path that cannot be written or exists already.
    """
    path = Path(path)
    container, encodings = _format(path)
    encoding = encodings[0] if encoding is None else encoding.upper()
    if encoding not in encodings:
        raise InputError(
            f"{path.suffix} files are written as {' or '.join(encodings)}, not {encoding}"
        )
    _check_samples(audio)
    rates = _RATES.get(encoding)
    if rates and audio.rate not in rates:
        audio = resample(audio, min((r for r in rates if r > audio.rate), default=rates[-1]))
    samples = np.asarray(audio.samples, np.float32)  # a JAX array is welcome, too
    if encoding != "FLOAT":
        samples = np.clip(samples, -1.0, 1.0)
    with atomic_write(path, overwrite=overwrite) as temporary:
        try:
            with soundfile.SoundFile(
                temporary, "w", audio.rate, audio.channels, encoding, format=container
            ) as file:
                # libsndfile's Vorbis encoder overflows its stack on long blocks.
                for start in range(0, samples.shape[1], _BLOCK):
                    file.write(samples[:, start : start + _BLOCK].T)
        except soundfile.LibsndfileError as error:
            raise InputError(
                f"cannot write {path} with {audio.channels} channels at {audio.rate} Hz: "
                f"{error.error_string}"
            ) from error


def resample(audio: Audio, rate: int) -> Audio:
    """Convert to another sampling rate (soxr, high quality); n becomes about n · rate / old.

    Raises:
      InputError: no such rate, or more than MAX_VALUES samples would come of it.
    """
    if not MIN_RATE <= rate <= MAX_RATE:
        raise InputError(f"the rate {rate} Hz is not between {MIN_RATE} and {MAX_RATE} Hz")
    if rate == audio.rate:
        return audio
    if audio.seconds * rate * audio.channels > MAX_VALUES:
        raise InputError(
            f"the audio lasts {audio.seconds:.0f} seconds, too long at {rate} Hz for memory; cut "
            f"it to {MAX_VALUES // (rate * audio.channels)} seconds"
        )
    import soxr

    converted = soxr.resample(audio.samples.T, audio.rate, rate)
    return Audio(np.ascontiguousarray(converted.T, np.float32), rate)


def mono(audio: Audio) -> Audio:
    """Average the channels: float32 [1, n]."""
    return Audio(audio.samples.mean(0, keepdims=True, dtype=np.float32), audio.rate)


def stereo(audio: Audio) -> Audio:
    """Two channels: one is doubled, of more than two the even and the odd ones are averaged."""
    left, right = audio.samples[0::2], audio.samples[1::2]
    if not len(right):
        right = left
    pair = np.stack([left.mean(0, dtype=np.float32), right.mean(0, dtype=np.float32)])
    return Audio(pair, audio.rate)


def loudness(audio: Audio) -> float:
    """Integrated loudness in LUFS (ITU-R BS.1770-4, by pyloudnorm); −∞ for silence.

    Clips under 0.4 s have no loudness: NaN. BS.1770 weighs at most five channels; of more, the
    average is measured.
    """
    import pyloudnorm

    if audio.samples.shape[1] < math.ceil(0.4 * audio.rate):
        return math.nan
    if audio.channels > 5:
        audio = mono(audio)
    if audio.rate < 8000:
        audio = resample(audio, 48000)  # the weighting filter rises up to 4 kHz
    with np.errstate(divide="ignore"):
        return float(
            pyloudnorm.Meter(audio.rate).integrated_loudness(np.asarray(audio.samples.T, float))
        )


def apply_gain(audio: Audio, gain_db: float, *, peak: float = 1.0) -> tuple[Audio, float]:
    """Scale by `gain_db`, or by less if the peak would pass `peak`.

    Returns:
      the audio and the gain in dB that it really got.
    """
    highest = float(np.abs(audio.samples).max(initial=0.0))
    factor = 10.0 ** (gain_db / 20.0)
    limited = highest * factor > peak
    if limited:
        factor = peak / highest
        gain_db = 20.0 * math.log10(factor)
    scaled = audio.samples * np.float32(factor)
    if limited:
        np.clip(scaled, -peak, peak, out=scaled)  # rounding may pass the peak by one unit
    return Audio(scaled, audio.rate), gain_db


def normalise(audio: Audio, lufs: float = -24.0, *, peak: float = 1.0) -> tuple[Audio, float]:
    """Bring to a loudness by one gain, and to less where the peak would pass `peak`.

    Silence and clips under 0.4 s, whose loudness is undefined, are only kept below the peak.

    Returns:
      the audio and the gain in dB that it got; `apply_gain` with its negative undoes it.
    """
    measured = loudness(audio)
    return apply_gain(audio, lufs - measured if math.isfinite(measured) else 0.0, peak=peak)


def pitch_shift(audio: Audio, semitones: float) -> Audio:
    """Shift the pitch by −12 … 12 semitones, keeping the length (librosa's phase vocoder)."""
    if not abs(semitones) <= MAX_SEMITONES:
        raise InputError(
            f"the pitch shift is {semitones} semitones; it must be from {-MAX_SEMITONES:g} "
            f"to {MAX_SEMITONES:g}"
        )
    if semitones == 0:
        return audio
    import librosa

    n_fft = 2048
    length = audio.samples.shape[1]
    padded = np.pad(audio.samples, ((0, 0), (0, max(0, n_fft - length))))
    shifted = librosa.effects.pitch_shift(padded, sr=audio.rate, n_steps=semitones, n_fft=n_fft)
    return Audio(np.ascontiguousarray(shifted[:, :length], np.float32), audio.rate)


def _format(path: Path) -> tuple[str, tuple[str, ...]]:
    try:
        return FORMATS[path.suffix.lower()]
    except KeyError:
        raise InputError(
            f"{path} has no audio format by its name; end it in {', '.join(FORMATS)}"
        ) from None


def _check_header(path: Path, file: soundfile.SoundFile, max_values: int) -> None:
    if not 1 <= file.channels <= MAX_CHANNELS:
        raise InputError(f"{path} has {file.channels} channels; at most {MAX_CHANNELS} are read")
    if not MIN_RATE <= file.samplerate <= MAX_RATE:
        raise InputError(
            f"{path} has a sampling rate of {file.samplerate} Hz; {MIN_RATE} to {MAX_RATE} Hz are "
            "read"
        )
    if file.frames * file.channels > max_values:
        seconds = max_values // (file.channels * file.samplerate)
        raise InputError(
            f"{path} has {file.frames} samples in {file.channels} channels, too many for memory; "
            f"cut it to {seconds} seconds"
        )


def _check_samples(audio: Audio) -> None:
    if audio.samples.ndim != 2 or 0 in audio.samples.shape:
        raise InputError(f"there is nothing to write: the samples' shape is {audio.samples.shape}")
    if not np.isfinite(audio.samples).all():
        raise InputError("the audio to write has samples that are not finite (NaN or infinity)")
