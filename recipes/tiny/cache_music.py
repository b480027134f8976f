"""Decode every track to 24 kHz mono and split the tracks into train, validation and test.

Reads `data/extracted` (the game music) and `data/scores` (rendered scores). Writes
`data/music/<source>/<track>.wav` (16 bits, so that excerpts are read in no time),
`data/music/index.json` (seconds and loudness of every track) and `recipes/tiny/split.json` (names
only). Tracks already there are kept, and a track keeps its side of the split for good: new
tracks are only ever added.
"""

import argparse
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pyloudnorm
import soundfile
import soxr

from codec_bridge.atomic import atomic_write

SAMPLE_RATE = 24_000
SHARE = 0.08  # of a source's seconds that validation and test each get, at least
VARIANT = "~"  # between the name of a track and the number of its variant
MADE_BY = "made_by.json"  # in a folder of variations: fingerprints of the model and its codec
SOURCES = {  # source → files below the data folder
    "wesnoth": "extracted/wesnoth-1.16-music/**/music/*.ogg",
    "planetblupi": "extracted/planetblupi-music-ogg/**/music/*.ogg",
    "hyperrogue": "extracted/hyperrogue-music/**/music/*.ogg",
    "extremetuxracer": "extracted/extremetuxracer-data/**/music/*.ogg",
    "lincity": "extracted/lincity-ng-data/**/music/**/*.ogg",
    "scores": "scores/*.flac",
}
SAME_TUNE = {"bach-bwv112": "bach-bwv104", "bach-bwv139": "bach-bwv377"}
"""Cantatas with another setting of the tune of a chorale that is held out."""
SPLIT_FILE = Path(__file__).parent / "split.json"


def write_json(path: Path, content: object) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def write_track(audio: np.ndarray, target: Path) -> dict[str, float]:
    """Write `[samples]` at 24 kHz, their peak below 1 → seconds and loudness (LUFS)."""
    audio = audio / max(1.001 * float(np.abs(audio).max(initial=0.0)), 1.0)
    loudness = float(pyloudnorm.Meter(SAMPLE_RATE).integrated_loudness(audio))
    with atomic_write(target) as temporary:
        soundfile.write(temporary, audio, SAMPLE_RATE, subtype="PCM_16")
    return {"seconds": round(len(audio) / SAMPLE_RATE, 2), "loudness": round(loudness, 2)}


def track_name(path: Path) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", path.stem).strip("-").lower()


def work_of(source: str, track: str) -> str:
    """What must not be torn apart: the movements of a work, the versions of a piece."""
    track = track.partition(VARIANT)[0]
    if source != "scores":
        return track.removesuffix("-old")
    work = re.sub(r"^(bach-bwv\d+).*", r"\1", track.partition("--")[0])
    return SAME_TUNE.get(work, work)


def decode(path: Path, target: Path) -> dict[str, float]:
    """Write one track → what `write_track` tells of it."""
    audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return write_track(soxr.resample(audio.mean(axis=1), rate, SAMPLE_RATE), target)


def assign(split: dict[str, list[str]], source: str, seconds: dict[str, float]) -> None:
    """Add this source's new tracks to the split, works in the order of their hash.

    Validation and test are closed once both have tracks of the source, on disk or not. From then
    on what is new is for training, or left out if it is of a work that is held out.
    """
    placed = {name: side for side, names in split.items() for name in names}
    side_of = {
        work_of(source, name.split("/", 1)[1]): side
        for name, side in placed.items()
        if name.startswith(f"{source}/")
    }
    closed = {"validation", "test"} <= set(side_of.values())
    works: dict[str, list[str]] = {}
    for track in sorted(seconds):
        works.setdefault(work_of(source, track), []).append(track)
    held = {"test": 0.0, "validation": 0.0}
    for track, length in seconds.items():
        if placed.get(f"{source}/{track}") in held:
            held[placed[f"{source}/{track}"]] += length
    goal = SHARE * sum(seconds.values())
    for work in sorted(works, key=lambda w: hashlib.sha256(f"{source}/{w}".encode()).hexdigest()):
        wanting = None if closed else next((s for s in held if held[s] < goal), None)
        side = side_of.get(work) or wanting or "train"
        for track in works[work]:
            is_new = f"{source}/{track}" not in placed
            if is_new and (side == "train" or not (closed or VARIANT in track)):
                split[side].append(f"{source}/{track}")
                if side in held:
                    held[side] += seconds[track]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    arguments = parser.parse_args()
    music = arguments.data / "music"
    music.mkdir(parents=True, exist_ok=True)
    index_file = music / "index.json"
    index = json.loads(index_file.read_text()) if index_file.exists() else {}
    for source, pattern in SOURCES.items():
        (music / source).mkdir(exist_ok=True)
        for path in sorted(arguments.data.glob(pattern)):
            name = f"{source}/{path.stem if source == 'scores' else track_name(path)}"
            target = music / f"{name}.wav"
            if name not in index or not target.exists():
                index[name] = decode(path, target)
                write_json(index_file, index)
                print(f"{name}: {index[name]}", flush=True)
    split = {"train": [], "validation": [], "test": []}
    if SPLIT_FILE.exists():
        split.update(json.loads(SPLIT_FILE.read_text()))
    for source in SOURCES:
        here = {
            n.split("/", 1)[1]: e["seconds"] for n, e in index.items() if n.startswith(source + "/")
        }
        assign(split, source, here)
    write_json(SPLIT_FILE, {side: sorted(names) for side, names in split.items()})
    for side, names in split.items():
        minutes = {s: 0.0 for s in SOURCES}
        for name in names:
            if name in index:
                minutes[name.split("/")[0]] += index[name]["seconds"] / 60
        print(side, {s: round(m, 1) for s, m in minutes.items()})


if __name__ == "__main__":
    main()
