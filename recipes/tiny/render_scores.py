"""Render scores of composers dead for more than a century with FluidSynth and FluidR3 GM.

The scores come with music21. Every work gets an ensemble and, where the score has no tempo
marking, a tempo, both drawn from the hash of its name, so that a second run renders the same.
Writes `data/scores/<composer>-<work>--<movement>.flac` (24 kHz mono); tracks already there are
kept. Works of several movements share the part of the name before `--`.

With `--variants N`, only scores of the training split, as `<track>~1` to `<track>~N`: ensembles
drawn anew, up to four semitones higher or lower, each part left out with a chance of one in four,
and a gain that wanders (augment_music.py).
"""

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile
import soxr
from augment_music import wander
from cache_music import SAMPLE_RATE, VARIANT
from music21 import common, converter, instrument, tempo
from music21.corpus import corpora

from codec_bridge.atomic import atomic_write

SCORES = {  # folder of music21's corpus → how many tracks at most
    "bach": 110,
    "monteverdi": 24,
    "mozart": 16,
    "haydn": 9,
    "beethoven": 20,
    "schumann_robert": 6,
    "schumann_clara": 5,
    "corelli": 1,
    "handel": 1,
    "joplin": 1,
    "schubert": 1,
    "weber": 1,
    "verdi": 1,
    "cpebach": 1,
    "chopin": 1,
}
ENSEMBLES = [  # General MIDI programs from the highest part to the lowest
    [40, 40, 41, 42, 43],  # strings
    [48, 48, 48, 48, 48],  # string section
    [73, 68, 71, 70, 70],  # woodwinds
    [74, 74, 75, 71, 70],  # recorders and clarinet
    [56, 60, 57, 57, 58],  # brass
    [52, 52, 52, 52, 52],  # choir
    [19, 19, 19, 19, 19],  # organ
    [0, 0, 0, 0, 0],  # piano
    [24, 24, 25, 24, 32],  # guitars
    [6, 6, 6, 6, 42],  # harpsichord and cello
    [11, 12, 46, 46, 43],  # vibraphone, marimba, harp, double bass
    [73, 40, 46, 42, 42],  # flute, violin, harp, cello
    [68, 65, 60, 42, 70],  # oboe, saxophone, horn, cello, bassoon
    [21, 71, 24, 0, 32],  # accordion, clarinet, guitar, piano, bass
]
SOUND_FONT = "extracted/fluid-soundfont-gm/usr/share/sounds/sf2/FluidR3_GM.sf2"


def chosen_scores() -> list[tuple[str, Path]]:
    """(track name, file), the composers taking turns so that any first part is varied."""
    root = corpora.CoreCorpus().manualCoreCorpusPath or common.getCorpusFilePath()
    root = Path(root)
    rows = []
    for composer, limit in SCORES.items():
        found = []
        for path in sorted((root / composer).rglob("*")):
            if path.suffix not in (".mxl", ".xml", ".krn"):
                continue
            parts = path.relative_to(root / composer).with_suffix("").parts
            work = "-".join([composer, *parts[:-1]]) if len(parts) > 1 else f"{composer}-{parts[0]}"
            name = f"{work}--{parts[-1]}" if len(parts) > 1 else work
            found.append((name.lower().replace(" ", "-"), path))
        found.sort(key=lambda row: hashlib.sha256(row[0].encode()).hexdigest())
        unique = list(dict(found).items())[:limit]
        rows += [((i + 0.5) / len(unique), name, path) for i, (name, path) in enumerate(unique)]
    return [(name, path) for _, name, path in sorted(rows)]


def variant_name(name: str, variant: int) -> str:
    """`name` itself for variant 0."""
    return f"{name}{VARIANT}{variant}" if variant else name


def render(name: str, path: Path, variant: int, sound_font: Path, longest: float) -> np.ndarray:
    """The score as float32 mono audio at 24 kHz, at most `longest` seconds.

    Variant 0 is the score as it stands.
    """
    work = variant_name(name.split("--")[0], variant)
    rng = random.Random(int(hashlib.sha256(work.encode()).hexdigest()[:8], 16))
    ensemble, beats = rng.choice(ENSEMBLES), rng.randint(66, 116)
    score = converter.parse(path)
    parts = list(score.parts)
    if variant:
        left_out = [part for part in parts if rng.random() < 0.25][: len(parts) - 1]
        for part in left_out:
            score.remove(part)
        parts = [part for part in parts if part not in left_out]
        amount = rng.choice([-4, -3, -2, -1, 1, 2, 3, 4])
        for part in parts:
            part.transpose(amount, inPlace=True)
    for i, part in enumerate(parts):
        for old in list(part.recurse().getElementsByClass(instrument.Instrument)):
            part.remove(old, recurse=True)
        place = 0 if len(parts) == 1 else round(i * (len(ensemble) - 1) / (len(parts) - 1))
        part.insert(0, instrument.instrumentFromMidiProgram(ensemble[place]))
    if parts and not list(score.recurse().getElementsByClass(tempo.MetronomeMark)):
        parts[0].insert(0, tempo.MetronomeMark(number=beats))
    with tempfile.TemporaryDirectory() as folder:
        midi = f"{folder}/score.mid"
        score.write("midi", midi)
        options = ["-niq", "-g", "0.6", "-r", "48000", "-T", "raw", "-F", "/dev/stdout"]
        command = ["fluidsynth", *options, sound_font, midi]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as synth:
            raw = synth.stdout.read(int(longest * 48_000) * 4)  # stereo int16; then it is stopped
            synth.kill()
    stereo = np.frombuffer(raw[: len(raw) // 4 * 4], np.int16).reshape(-1, 2) / np.float32(32768)
    audio = soxr.resample(stereo.mean(axis=1), 48_000, SAMPLE_RATE)
    loud = np.flatnonzero(np.abs(audio) > 1e-3)
    if not len(loud):
        raise ValueError("rendered to silence")
    audio = audio[loud[0] : loud[-1] + 1]
    if variant:
        audio *= wander(variant_name(name, variant), len(audio))
        audio /= max(1.001 * float(np.abs(audio).max()), 1.0)
    return audio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument(
        "--minutes", type=float, default=240, help="of music in all; not with --variants"
    )
    parser.add_argument(
        "--variants",
        type=int,
        default=0,
        help="of every training score that was rendered, and nothing else",
    )
    parser.add_argument("--longest", type=float, default=240, help="seconds per track")
    a = parser.parse_args()
    sound_font = a.data / SOUND_FONT
    if not sound_font.exists():
        sys.exit(f"{sound_font} does not exist; run fetch.sh first")
    if not shutil.which("fluidsynth"):
        sys.exit("fluidsynth is not installed (Debian: apt-get install fluidsynth)")
    out = a.data / "scores"
    out.mkdir(parents=True, exist_ok=True)
    split = Path(__file__).parent / "split.json"
    training = json.loads(split.read_text())["train"] if split.exists() else []
    seconds = 0.0
    for name, path in chosen_scores():
        if seconds > 60 * a.minutes and not a.variants:
            break
        original = out / f"{name}.flac"
        if a.variants and not (f"scores/{name}" in training and original.exists()):
            continue
        for variant in range(1, a.variants + 1) if a.variants else [0]:
            target = out / f"{variant_name(name, variant)}.flac"
            if not target.exists():
                try:
                    audio = render(name, path, variant, sound_font, a.longest)
                except Exception as error:  # music21 raises whatever a score's quirk leads to
                    print(f"{target.stem}: left out ({type(error).__name__}: {error})", flush=True)
                    continue
                with atomic_write(target) as temporary:
                    soundfile.write(temporary, audio, SAMPLE_RATE, format="FLAC")
            length = soundfile.info(target).duration
            seconds += length
            print(f"{target.stem}: {length:.0f} s, {seconds / 60:.1f} minutes in all", flush=True)


if __name__ == "__main__":
    main()
