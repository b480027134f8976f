"""Try prompts on the validation split: how near to the input are variations, and how much is new?

For every prompt a variation of a few clips per source: mel distance to the input, chroma
correlation with it, and the share of the tokens that were generated. What was chosen goes into the
model's config.json by `assemble.py`.
"""

import jax
import numpy as np
from clips import clips, compare, options

import vampnet_jax as vampnet
from vampnet_jax.prompts import PRESETS, Prompt

ALL = 16
"""Kept frames keep all codebooks of `tiny`."""
PROMPTS = {
    **{f"{name} of the original": PRESETS[name] for name in PRESETS if name != "unconditional"},
    **{
        f"{width} of {period} frames, all codebooks": Prompt(
            periodic=period, width=width, upper_codebooks=ALL
        )
        for period, width in (
            (7, 1), (5, 1), (3, 1), (10, 3), (9, 3), (8, 3), (2, 1), (10, 5), (6, 3), (5, 3), (4, 3)
        )
    },
    **{
        f"{width} of {period} frames, a fifth dropped": Prompt(
            periodic=period, width=width, dropout=0.2, upper_codebooks=ALL
        )
        for period, width in ((9, 3), (3, 1))
    },
    **{
        f"{width} of {period} frames, 120 ms after beats": Prompt(
            periodic=period, width=width, beat=0.12, upper_codebooks=ALL
        )
        for period, width in ((6, 3), (9, 3), (2, 1), (3, 1))
    },
    "200 ms after beats": Prompt(beat=0.2, upper_codebooks=ALL),
}  # fmt: skip


def main() -> None:
    parser = options(__doc__, n_clips=1)
    a = parser.parse_args()
    audio = [clip for _, clip in clips(a.music, a.split, "validation", a.clips)]
    model = vampnet.load(a.model)
    codec = model.codec
    tokens = [codec.encode(clip[None]) for clip in audio]
    print("| kept | mel distance | chroma correlation | generated |\n|---|---|---|---|")
    for name, prompt in PROMPTS.items():
        rows = []
        for number, (clip, known) in enumerate(zip(audio, tokens, strict=True)):
            key = jax.random.fold_in(jax.random.key(a.seed), number)
            rhythm = prompt.listen(clip, codec.sample_rate, codec.hop_length)
            mask = prompt.mask(
                known.shape, key, frame_rate=codec.sample_rate / codec.hop_length, rhythm=rhythm
            )
            new = np.asarray(codec.decode(vampnet.vamp(model, known, mask, key)))[0][: len(clip)]
            rows.append((*compare(clip, new), float(mask.mean())))
        mel, chroma, generated = np.mean(rows, axis=0)
        print(f"| {name} | {mel:.3f} | {chroma:.3f} | {generated:.0%} |", flush=True)


if __name__ == "__main__":
    main()
