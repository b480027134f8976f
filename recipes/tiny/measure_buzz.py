"""How alike is sound above 1.5 kHz to itself one frame later, in music and as codecs decode it?

Median over clips of the validation split of the correlation, the highest within 8 samples of a
frame's length. A decoder that makes the same in every frame has a pitch, that of the frame rate:
it buzzes. A frame and a half later it is not alike: steady notes are not what is found.
"""

import numpy as np
import scipy.signal
from clips import clips, options

import codec_bridge
from vampnet_jax.evaluation.distances import SAMPLE_RATE, mel_distance

ABOVE = 1500.0
NEAR = 8
"""Samples."""


def likeness(audio: np.ndarray, lag: int) -> float:
    """Correlation of the treble of `[samples]` with itself `lag` samples later."""
    treble = scipy.signal.sosfilt(
        scipy.signal.butter(8, ABOVE, "highpass", fs=SAMPLE_RATE, output="sos"), audio
    )
    return max(
        float(np.corrcoef(treble[k:], treble[:-k])[0, 1]) for k in range(lag - NEAR, lag + NEAR + 1)
    )


def main() -> None:
    parser = options(__doc__, n_clips=2, model=False, draws=False)
    parser.add_argument("codecs", nargs="+", help="codec files")
    a = parser.parse_args()
    audio = [clip for _, clip in clips(a.music, a.split, "validation", a.clips)]
    print("| | one frame later | a frame and a half later | mel distance |\n|---|---|---|---|")
    for name in ["music", *a.codecs]:
        codec = codec_bridge.load(a.codecs[0] if name == "music" else name)
        made = audio
        if name != "music":
            made = [np.asarray(codec.decode(codec.encode(clip[None])))[0] for clip in audio]
        hop = codec.hop_length
        values = [np.median([likeness(x, lag) for x in made]) for lag in (hop, hop * 3 // 2)]
        distance = np.mean([mel_distance(x, y) for x, y in zip(audio, made, strict=True)])
        print(f"| {name} | {values[0]:.2f} | {values[1]:.2f} | {distance:.3f} |", flush=True)


if __name__ == "__main__":
    main()
