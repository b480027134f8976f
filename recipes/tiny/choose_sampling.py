"""Try ways of sampling on the validation split: which keep closest to the notes of the input?

For every way, variations of a few clips per source: mel distance to the input, chroma
correlation with it, and the change of level in dB (before the loudness is restored); with
`--prefix` the same of what continues the first seconds of the clips. The codec alone comes first.
What is best goes into the model's config.json by `assemble.py`.
"""

import jax
import numpy as np
from clips import SECONDS, clips, compare, options

import vampnet_jax as vampnet
from vampnet_jax.prompts import Prompt
from vampnet_jax.sampling import SamplingOptions

OFF = {"typical_mass": None}
LIKELIEST = OFF | {"sample_cutoff": 0.0}
BY_CODEBOOK = {"codebook_steps": (24, 8, 8, 8)}
WAYS: dict[str, tuple[dict, dict]] = {  # of the coarse model, of the fine one; else the original's
    "original": ({}, {}),
    "original, likeliest": ({}, LIKELIEST),
    "temperature 0.7 and 5 for masks, likeliest": (
        {"temperature": 0.7, "mask_temperature": 5.0},
        LIKELIEST,
    ),
    "mask temperature 3, likeliest": ({"mask_temperature": 3.0}, LIKELIEST),
    "no filter, likeliest": (OFF, LIKELIEST),
    "temperature 0.9, likeliest": (OFF | {"temperature": 0.9}, LIKELIEST),
    "temperature 0.7, likeliest": (OFF | {"temperature": 0.7}, LIKELIEST),
    "top-p 0.9, likeliest": (OFF | {"top_p": 0.9}, LIKELIEST),
    "top-p 0.7, likeliest": (OFF | {"top_p": 0.7}, LIKELIEST),
    "top-p 0.4, likeliest": (OFF | {"top_p": 0.4}, LIKELIEST),
    "top-k 32, likeliest": (OFF | {"top_k": 32}, LIKELIEST),
    "guidance 0.5, likeliest": ({"guidance": 0.5}, LIKELIEST),
    "codebook by codebook, likeliest": (BY_CODEBOOK, LIKELIEST),
    "codebook by codebook, guidance 0.35, likeliest": (BY_CODEBOOK | {"guidance": 0.35}, LIKELIEST),
    "codebook by codebook, guidance 0.5, likeliest": (BY_CODEBOOK | {"guidance": 0.5}, LIKELIEST),
    "codebook by codebook, top-p 0.9, likeliest": (BY_CODEBOOK | OFF | {"top_p": 0.9}, LIKELIEST),
    "spread, likeliest": ({"order": "spread"}, LIKELIEST),
    "likeliest and mask temperature 3, likeliest": (
        LIKELIEST | {"mask_temperature": 3.0},
        LIKELIEST,
    ),
    "top-p 0.7, top-p 0.7": (OFF | {"top_p": 0.7}, OFF | {"top_p": 0.7}),
}


def options_of(way: str, *, steps: int) -> tuple[SamplingOptions, SamplingOptions]:
    """Of the coarse model, with so many steps unless the way says otherwise, and the fine one."""
    coarse, fine = WAYS[way]
    return SamplingOptions(**{"steps": steps, **coarse}), SamplingOptions(**{"steps": 2, **fine})


def main() -> None:
    parser = options(__doc__, n_clips=1)
    parser.add_argument("--preset", default="medium-variation", help="of the model's own")
    parser.add_argument(
        "--prefix", type=float, default=0.0, help="keep these first seconds instead of a preset"
    )
    parser.add_argument(
        "--steps", type=int, default=24, help="of the coarse model, if not codebook by codebook"
    )
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    a = parser.parse_args()
    if not 0 <= a.prefix < SECONDS - 1:
        parser.error(f"--prefix must be at least 0 and less than {SECONDS - 1:g}")
    audio = [clip for _, clip in clips(a.music, a.split, "validation", a.clips)]
    model = vampnet.load(a.model)
    codec = model.codec
    if a.preset not in model.presets:
        parser.error(f"--preset must be one of {', '.join(model.presets)}")
    tokens = [codec.encode(clip[None]) for clip in audio]
    frame_rate = codec.sample_rate / codec.hop_length
    prompt = Prompt(prefix=a.prefix) if a.prefix else model.presets[a.preset]
    start = round(a.prefix * codec.sample_rate)

    def measure(clip: np.ndarray, tokens: np.ndarray) -> tuple[float, float, float]:
        new, old = np.asarray(codec.decode(tokens))[0][start : len(clip)], clip[start:]
        level = 10 * np.log10(np.square(new).mean() / np.square(old).mean())
        return *compare(old, new), level

    def show(name: str, rows: list[tuple[float, float, float]]) -> None:
        mel, chroma, level = np.mean(rows, axis=0)
        print(f"| {name} | {mel:.3f} | {chroma:.3f} | {level:+.1f} |", flush=True)

    print("| | mel distance | chroma correlation | level, dB |\n|---|---|---|---|")
    show("codec alone", [measure(*pair) for pair in zip(audio, tokens, strict=True)])
    for way in a.ways:
        rows = []
        for number, (clip, known) in enumerate(zip(audio, tokens, strict=True)):
            key = jax.random.fold_in(jax.random.key(a.seed), number)
            rhythm = prompt.listen(clip, codec.sample_rate, codec.hop_length)
            mask = prompt.mask(known.shape, key, frame_rate=frame_rate, rhythm=rhythm)
            made = vampnet.vamp(model, known, mask, key, *options_of(way, steps=a.steps))
            rows.append(measure(clip, made))
        show(way, rows)


if __name__ == "__main__":
    main()
