"""Every training track of the game music twice more: higher and faster, and lower and slower.

By one to three semitones, as a tape that runs at another speed: resampled, so nothing is smeared
as a phase vocoder would; and louder and quieter by a gain that wanders, since a track's own level
is normalised before encoding. (Scores are rendered anew instead: render_scores.py --variants, with
such a gain too.) Reads `split.json` and adds to `data/music` and its `index.json`; cache_music.py
then adds the copies to the split. Copies already there are kept.
"""

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import soundfile
import soxr
from cache_music import SAMPLE_RATE, SPLIT_FILE, VARIANT, write_json, write_track


def semitones(name: str, copy: int) -> int:
    """1 to 3 up for the first copy, down for the second; drawn from the name."""
    amount = 1 + hashlib.sha256(f"{name}{VARIANT}{copy}".encode()).digest()[0] % 3
    return amount if copy == 1 else -amount


def wander(name: str, samples: int) -> np.ndarray:
    """[samples] gains, drawn from the name: every 8 s a new one, normal with 4 dB, within 8 dB."""
    seed = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
    step = 8 * SAMPLE_RATE
    decibels = np.random.default_rng(seed).normal(0, 4, samples // step + 2).clip(-8, 8)
    at = np.arange(samples, dtype=np.float32) / step
    return 10 ** (np.interp(at, np.arange(len(decibels)), decibels).astype(np.float32) / 20)


def shift(source: Path, target: Path, amount: int) -> dict[str, float]:
    """Write the track `amount` semitones higher, with a gain that wanders → as `write_track`."""
    audio, rate = soundfile.read(source, dtype="float32")
    audio = soxr.resample(audio, rate * 2 ** (amount / 12), rate)
    return write_track(audio * wander(target.stem, len(audio)), target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--music", type=Path, default=Path("data/music"))
    a = parser.parse_args()
    index_file = a.music / "index.json"
    index = json.loads(index_file.read_text())
    split = json.loads(SPLIT_FILE.read_text())
    originals = [name for name in split["train"] if VARIANT not in name and name in index]
    for name in originals:
        if name.startswith("scores/"):
            continue
        for copy in (1, 2):
            new, amount = f"{name}{VARIANT}{copy}", semitones(name, copy)
            target = a.music / f"{new}.wav"
            if new not in index or not target.exists():
                index[new] = shift(a.music / f"{name}.wav", target, amount)
                write_json(index_file, index)
                print(f"{new}: {amount:+d} semitones, {index[new]['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
