"""Half a minute from nothing: does it stay level, with more than one note, as music does?

Level and pitch classes of unconditional pieces, second by second, beside the range that excerpts of
music as long have; and how many are outside of it, beside how many of the excerpts are outside the
range of all others, as the extremes of every statistic are. With `--ways` the pieces are sampled as
choose_sampling.py names it.
"""

import jax
import jax.numpy as jnp
import librosa
import numpy as np
from choose_sampling import WAYS, options_of
from clips import clips, options

import vampnet_jax as vampnet
from vampnet_jax.evaluation.distances import SAMPLE_RATE

SECONDS = 30.0


def statistics(audio: np.ndarray) -> dict[str, float]:
    """Of a piece `[samples]`, in blocks of a second."""
    blocks = audio[: len(audio) // SAMPLE_RATE * SAMPLE_RATE].reshape(-1, SAMPLE_RATE)
    levels = 10 * np.log10(np.square(blocks).mean(axis=1) + 1e-8)
    chroma = librosa.feature.chroma_stft(
        y=audio, sr=SAMPLE_RATE, n_fft=4096, hop_length=SAMPLE_RATE // 8
    )
    shares = chroma / np.maximum(chroma.sum(axis=0), 1e-9)
    mean = shares.mean(axis=1) / shares.mean(axis=1).sum()
    seconds = shares[:, : len(blocks) * 8].reshape(12, -1, 8).mean(axis=2)
    third = len(levels) // 3
    return {
        "level: standard deviation, dB": float(levels.std()),
        "level: last third less first, dB": float(levels[-third:].mean() - levels[:third].mean()),
        "level: quietest second below the mean, dB": float(levels.mean() - levels.min()),
        "pitch classes: entropy of the piece, bits": float(-(mean * np.log2(mean + 1e-12)).sum()),
        "pitch classes: entropy of a frame, bits": float(
            -(shares * np.log2(shares + 1e-12)).sum(axis=0).mean()
        ),
        "pitch classes: share that changes in a second": float(
            np.abs(np.diff(seconds, axis=1)).sum(axis=0).mean() / 2
        ),
    }


def main() -> None:
    parser = options(__doc__, n_clips=16)
    parser.add_argument("--pieces", type=int, default=4, help="how many to make")
    parser.add_argument("--part", choices=("test", "validation"), default="test", help="of music")
    parser.add_argument("--ways", nargs="*", choices=list(WAYS), help="not as the model says")
    a = parser.parse_args()
    music = [statistics(x) for _, x in clips(a.music, a.split, a.part, a.clips, SECONDS)]
    model = vampnet.load(a.model)
    codec = model.codec
    shape = (1, codec.n_codebooks, round(SECONDS * codec.sample_rate / codec.hop_length))
    sampling = {"": (model.coarse_sampling, model.fine_sampling)}
    if a.ways:
        sampling = {name: options_of(name, steps=24) for name in a.ways}
    for name, (coarse, fine) in sampling.items():
        made = []
        for number in range(a.pieces):
            key = jax.random.fold_in(jax.random.key(a.seed), number)
            nothing, everything = jnp.zeros(shape, jnp.int32), jnp.ones(shape, bool)
            tokens = vampnet.vamp(model, nothing, everything, key, coarse, fine)
            made.append(statistics(np.asarray(codec.decode(tokens))[0]))
        show(name, music, made)


def is_outside(piece: dict[str, float], music: list[dict[str, float]]) -> bool:
    """Whether any statistic is outside the range of the music, to two places."""
    return any(
        not min(round(m[name], 2) for m in music)
        <= round(value, 2)
        <= max(round(m[name], 2) for m in music)
        for name, value in piece.items()
    )


def show(way: str, music: list[dict[str, float]], made: list[dict[str, float]]) -> None:
    """Print a table of the statistics of music and of what was made, and how many are outside."""
    print(f"| {way} | {len(music)} excerpts of music: least, median, most | {len(made)} pieces |")
    print("|---|---|---|")
    for name in music[0]:
        known = sorted(m[name] for m in music)
        values = ", ".join(f"{m[name]:.2f}" for m in made)
        outside = sum(is_outside({name: m[name]}, music) for m in made)
        middle = f"{known[0]:.2f}, {np.median(known):.2f}, {known[-1]:.2f}"
        print(f"| {name} | {middle} | {values}{f' ({outside} outside)' if outside else ''} |")
    others = [music[:i] + music[i + 1 :] for i in range(len(music))]
    extreme = sum(is_outside(*pair) for pair in zip(music, others, strict=True))
    strange = sum(is_outside(piece, music) for piece in made)
    print(
        f"\nOutside in one or more: {strange} of {len(made)} pieces; "
        f"of the music, {extreme} of {len(music)} excerpts are outside the range of the others.\n",
        flush=True,
    )


if __name__ == "__main__":
    main()
