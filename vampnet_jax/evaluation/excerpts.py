"""Excerpts of a folder of recordings: none overlap, and they spread over all that there is."""

import dataclasses
from pathlib import Path

import numpy as np
import soundfile

from codec_bridge.audio import FORMATS, Audio, mono, normalise, resample
from codec_bridge.errors import InputError
from vampnet_jax.pipeline import LOUDNESS


@dataclasses.dataclass(frozen=True)
class Excerpt:
    """Where an excerpt lies."""

    path: Path
    start: int
    """First sample, at the file's rate."""
    seconds: float

    def read(self, rate: int) -> np.ndarray:
        """float32 `[samples]` at `rate`, mono, at −24 LUFS with a peak of at most 1."""
        with soundfile.SoundFile(self.path) as file:
            file.seek(self.start)
            samples = file.read(round(self.seconds * file.samplerate), "float32", always_2d=True)
            audio = mono(Audio(np.ascontiguousarray(samples.T), file.samplerate))
        audio = normalise(resample(audio, rate), LOUDNESS)[0]
        n = round(self.seconds * rate)
        return np.pad(audio.samples[0, :n], (0, max(0, n - audio.samples.shape[1])))


def choose_excerpts(folder: Path, count: int, seconds: float) -> list[Excerpt]:
    """`count` places over the recordings below a folder, in order of names and times.

    Every recording is divided into as many equal parts as it has room for excerpts. Of all parts
    `count` are taken at even distances, and an excerpt is the beginning of each.

    Raises:
      InputError: no such folder, no recording of this length, or not room for so many.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder of recordings.")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in FORMATS and p.is_file())
    parts: list[Excerpt] = []
    for path in files:
        try:
            info = soundfile.info(path)
        except soundfile.LibsndfileError:
            continue  # not audio after all
        n = int(info.duration / seconds)
        parts += [Excerpt(path, i * info.frames // n, seconds) for i in range(n)]
    if not parts:
        raise InputError(
            f"{folder} has no recording of {seconds:g} s or more ({len(files)} audio files)."
        )
    if count > len(parts):
        raise InputError(
            f"{folder} has room for {len(parts)} excerpts of {seconds:g} s that do not overlap, "
            f"and {count} are needed; ask for fewer or shorter ones."
        )
    return [parts[(2 * i + 1) * len(parts) // (2 * count)] for i in range(count)]
