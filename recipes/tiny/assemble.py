"""Put codec, coarse and fine model together as a model directory.

Reads the training runs; `MODEL_CARD.md` and the licences in --out are kept, and the example clip is
cut from a score of the test split. All weights are rounded to bfloat16; of the models, the
averaged ones are taken.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyloudnorm
import soundfile
from relabel_tokens import makes_the_same_tokens

import codec_bridge
from codec_bridge.atomic import atomic_write
from vampnet_jax import prompts
from vampnet_jax.compression.frequencies import FREQUENCIES
from vampnet_jax.prompts import Prompt
from vampnet_jax.release import Model, Stage, load, save
from vampnet_jax.sampling import SamplingOptions
from vampnet_jax.training.checkpoints import load_run, read_run

# As choose_sampling.py and from_nothing.py measured on the validation split.
COARSE_SAMPLING = SamplingOptions(
    steps=24, codebook_steps=(24, 8, 8, 8), typical_mass=None, top_p=0.9
)
FINE_SAMPLING = SamplingOptions(steps=2, typical_mass=None, sample_cutoff=0.0)
# As choose_presets.py measured there: frames keep all 16 codebooks, or the notes are lost.
PRESETS = {
    "small-variation": Prompt(periodic=4, width=3, upper_codebooks=16),
    "medium-variation": Prompt(periodic=2, upper_codebooks=16),
    "large-variation": Prompt(periodic=3, dropout=0.2, upper_codebooks=16),
    "beat-small-variation": Prompt(periodic=2, beat=0.12, upper_codebooks=16),
    "beat-medium-variation": Prompt(periodic=3, beat=0.12, upper_codebooks=16),
    "beat-large-variation": Prompt(beat=0.2, upper_codebooks=16),
}
FILES = ("config.json", "coarse.safetensors", "fine.safetensors", "codec.safetensors")


def cut_example(source: Path, target: Path, seconds: float = 10.0) -> None:
    """The first seconds of a track, faded out at the end, at -20 LUFS."""
    audio, rate = soundfile.read(source, dtype="float32")
    audio = audio[: int(seconds * rate)]
    fade = int(0.05 * rate)
    audio[-fade:] *= np.linspace(1, 0, fade, dtype=np.float32)
    gain = 10 ** ((-20 - pyloudnorm.Meter(rate).integrated_loudness(audio)) / 20)
    audio *= min(gain, 0.95 / np.abs(audio).max())
    with atomic_write(target) as path:
        soundfile.write(path, audio, rate, subtype="PCM_16")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--codec", type=Path, default=Path("runs/tuned/codec.safetensors"))
    parser.add_argument("--tuned", type=Path, help="the codec with a tuned decoder, to be shipped")
    parser.add_argument("--coarse", type=Path, default=Path("runs/coarse"))
    parser.add_argument("--fine", type=Path, default=Path("runs/fine"))
    parser.add_argument("--out", type=Path, default=Path("vampnet_jax/models/tiny"))
    parser.add_argument("--music", type=Path, default=Path("data/music"))
    parser.add_argument("--example", default="scores/mozart-k545--movement1_exposition")
    parser.add_argument("--name", default="tiny")
    a = parser.parse_args()
    codec = codec_bridge.load(a.codec)
    for run in (a.coarse, a.fine):
        if read_run(run)[1]["codec"]["fingerprint"] != codec.fingerprint:
            sys.exit(f"{run} was trained on tokens of another codec than {a.codec}")
    if a.tuned:
        token_codec, codec = codec, codec_bridge.load(a.tuned)
        if not makes_the_same_tokens(token_codec, codec):
            sys.exit(f"{a.tuned} and {a.codec} differ in more than the decoder")
    model = Model(
        coarse=Stage(*load_run(a.coarse)),
        fine=Stage(*load_run(a.fine)),
        codec=codec,
        coarse_window=round(read_run(a.coarse)[0].window_seconds * codec.frame_rate),
        fine_window=round(read_run(a.fine)[0].window_seconds * codec.frame_rate),
        coarse_sampling=COARSE_SAMPLING,
        fine_sampling=FINE_SAMPLING,
        presets=prompts.PRESETS | PRESETS,
        name=a.name,
    ).computing_in("float32")  # whatever they were trained in
    a.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=a.out.parent) as folder:
        save(model, Path(folder) / "model", dtype="bfloat16")
        for name in FILES:
            (Path(folder) / "model" / name).replace(a.out / name)
    (a.out / FREQUENCIES).unlink(missing_ok=True)  # those of another codec; token_frequencies.py
    cut_example(a.music / f"{a.example}.wav", a.out / "example.flac")
    total = sum(file.stat().st_size for file in a.out.iterdir())
    print(f"{a.out}: {total / 2**20:.1f} MiB, codec {load(a.out).codec.fingerprint[:12]}")


if __name__ == "__main__":
    main()
