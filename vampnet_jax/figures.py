"""Pictures of a variation: the mask over its tokens, and spectrograms before and after.

matplotlib is imported when a picture is drawn, and its global state (pyplot) is not used. librosa
could draw the spectrograms, but importing its features and numba takes longer than drawing them.
"""

import os
from typing import TYPE_CHECKING

import numpy as np

from codec_bridge.atomic import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_COLUMNS = 1600
"""Points in time of a spectrogram: as many as a picture shows, whatever the length of the clip."""
N_FFT = 2048
DYNAMIC_RANGE = 80.0
"""Decibels between the brightest and the darkest colour."""
N_BANDS = 128
GENERATED = np.array([0.91, 0.90, 0.88])
"""Colour of tokens that the model made up; kept ones have that of their id."""


def spectrogram(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    """Power in bands of equal width on the mel scale, in decibels.

    Args:
      audio: float `[samples]`.
      sample_rate: in Hz.

    Returns:
      float32 `[N_BANDS, columns]`, low bands first; at most `MAX_COLUMNS` points in time.
    """
    padded = np.pad(audio, N_FFT // 2)
    last = len(padded) - N_FFT
    starts = np.linspace(0, last, min(MAX_COLUMNS, max(2, last // 128))).astype(int)
    edges = _mel_to_hz(np.linspace(0, _hz_to_mel(sample_rate / 2), N_BANDS + 1))
    bins = np.round(edges * N_FFT / sample_rate).astype(int)
    low, high = bins[:-1], np.maximum(bins[1:], bins[:-1] + 1)
    window = np.hanning(N_FFT)
    power = np.empty((N_BANDS, len(starts)), np.float32)
    for column, start in enumerate(starts):  # one at a time: long clips must not fill the memory
        spectrum = np.abs(np.fft.rfft(window * padded[start : start + N_FFT])) ** 2
        total = np.concatenate([[0.0], np.cumsum(spectrum)])
        power[:, column] = (total[high] - total[low]) / (high - low)
    return 10 * np.log10(np.maximum(power, 1e-10))


def draw_variation(
    path: str | os.PathLike[str],
    *,
    title: str,
    tokens: np.ndarray,
    mask: np.ndarray,
    frame_rate: float,
    before: np.ndarray | None,
    after: np.ndarray | None,
    sample_rate: int,
) -> None:
    """Write one picture of a variation as PNG.

    Args:
      path: the file.
      title: a line at the top.
      tokens: int `[C, T]`, what the model was given.
      mask: bool `[C, T]`, True = generated; kept tokens are drawn in the colour of their id. Not
        drawn beside an output alone of which nothing was kept.
      frame_rate: codec frames per second.
      before, after: float `[samples]`, mono; None leaves the spectrogram out.
      sample_rate: of both, in Hz.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    spectrograms = {
        name: (spectrogram(audio, sample_rate), len(audio) / sample_rate)
        for name, audio in (("input", before), ("output", after))
        if audio is not None and len(audio)
    }
    panels = ["tokens", *spectrograms] if len(spectrograms) < 2 else ["input", "tokens", "output"]
    if list(spectrograms) == ["output"] and mask.all():  # made from nothing
        panels = ["output"]
    inches = [0.6 + 0.16 * len(tokens) if panel == "tokens" else 2.2 for panel in panels]
    height = sum(inches) + 0.2 * len(panels) + 0.8
    figure = Figure(figsize=(12, height))
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        len(panels), 1, height_ratios=inches, hspace=0.1, left=0.07, right=0.99,
        bottom=0.5 / height, top=1 - 0.4 / height,
    )  # fmt: skip
    axes = grid.subplots(sharex=True, squeeze=False)[:, 0]
    # Both spectrograms share their colours, so that louder looks louder.
    top = max((float(decibels.max()) for decibels, _ in spectrograms.values()), default=0.0)
    for panel, axis in zip(panels, axes, strict=True):
        if panel == "tokens":
            _draw_tokens(axis, tokens, mask, frame_rate)
        else:
            decibels, seconds = spectrograms[panel]
            _draw_spectrogram(axis, panel, decibels - top, seconds, sample_rate)
    ends = [seconds for _, seconds in spectrograms.values()]
    axes[0].set_xlim(0, max([tokens.shape[1] / frame_rate, *ends]))
    axes[0].set_title(title, loc="left", fontsize=11, parse_math=False)  # a name may hold $
    axes[-1].set_xlabel("seconds")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


def _draw_spectrogram(
    axis: "Axes", name: str, decibels: np.ndarray, seconds: float, sample_rate: int
) -> None:
    axis.imshow(
        decibels,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        cmap="magma",
        vmin=-DYNAMIC_RANGE,
        vmax=0,
        extent=(0, seconds, 0, N_BANDS),
    )
    marks = [f for f in (200, 500, 1000, 2000, 5000, 10_000, 20_000) if f < sample_rate / 2]
    highest = _hz_to_mel(sample_rate / 2)
    axis.set_yticks(
        [N_BANDS * _hz_to_mel(f) / highest for f in marks],
        [f"{f / 1000:g}k" if f >= 1000 else str(f) for f in marks],
    )
    axis.set_ylabel(f"{name}\nHz")


def _draw_tokens(axis: "Axes", tokens: np.ndarray, mask: np.ndarray, frame_rate: float) -> None:
    n_codebooks, n_frames = tokens.shape
    axis.imshow(
        _token_colours(tokens, mask),
        origin="upper",
        aspect="auto",
        interpolation="nearest",
        extent=(0, n_frames / frame_rate, n_codebooks - 0.5, -0.5),
    )
    axis.set_yticks(range(0, n_codebooks, max(1, n_codebooks // 7)))
    kept = 100 * (1 - mask.mean()) if mask.size else 0
    axis.set_ylabel(f"codebook\n({kept:.0f} % kept)")


def _token_colours(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """RGB `[C, columns, 3]`; where several frames share a column, mixed by the share kept."""
    from matplotlib import colormaps

    n_frames = tokens.shape[1]
    starts = np.arange(min(n_frames, MAX_COLUMNS)) * n_frames // min(n_frames, MAX_COLUMNS)
    sizes = np.diff(starts, append=n_frames)
    kept = (np.add.reduceat(~mask, starts, axis=1, dtype=np.float64) / sizes)[..., None]
    colour = colormaps["viridis"](tokens[:, starts] / max(1, int(tokens.max())))[..., :3]
    return kept * colour + (1 - kept) * GENERATED


def _hz_to_mel(frequency: float) -> float:
    return 2595 * float(np.log10(1 + frequency / 700))


def _mel_to_hz(mel: np.ndarray) -> np.ndarray:
    return 700 * (10 ** (mel / 2595) - 1)
