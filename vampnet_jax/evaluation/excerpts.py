"""Excerpts of a folder of recordings, spread evenly over all that there is."""

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
    """`count` places at even distances over the recordings below a folder, in order of names.

    Raises:
      InputError: no such folder, or it has no recording of this length.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder of recordings.")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in FORMATS and p.is_file())
    room: list[tuple[Path, float, int]] = []  # (file, seconds in which an excerpt may start, rate)
    for path in files:
        try:
            info = soundfile.info(path)
        except soundfile.LibsndfileError:
            continue  # not audio after all
        if info.duration >= seconds:
            room.append((path, info.duration - seconds, info.samplerate))
    if not room:
        raise InputError(
            f"{folder} has no recording of {seconds:g} s or more ({len(files)} audio files)."
        )
    ends = np.cumsum([max(left, 1e-3) for _, left, _ in room])
    excerpts = []
    for place in (np.arange(count) + 0.5) / count * ends[-1]:
        i = min(int(np.searchsorted(ends, place, side="right")), len(room) - 1)
        path, left, rate = room[i]
        at = min(float(place - (ends[i - 1] if i else 0.0)), left)
        excerpts.append(Excerpt(path, int(at * rate), seconds))
    return excerpts
