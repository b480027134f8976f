"""From what a person asks for, a share, a grid or a bitrate, to a file."""

import dataclasses
import math

import numpy as np

from codec_bridge.audio import Audio, mono, resample
from codec_bridge.errors import InputError
from vampnet_jax.compression.choosing import order_of_worth
from vampnet_jax.compression.coding import grid
from vampnet_jax.compression.compressor import Compressor
from vampnet_jax.compression.container import HEADER_BYTES, MAX_PERIOD
from vampnet_jax.evaluation.distances import SAMPLE_RATE, mel_distance
from vampnet_jax.pipeline import Clip, Progress

TRIAL_SECONDS = 10.0
"""Settings under a budget are compared on the middle of the clip."""
SHARE_STEPS = 200


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """What to keep, and what a file of it holds."""

    keep: np.ndarray
    """bool `[codebooks, T]`."""
    period: int
    """0: `keep` is no grid."""
    data: bytes
    """The whole file."""

    @property
    def kept(self) -> str:
        """In words."""
        codebooks = f"{len(self.keep)} codebooks"
        if self.period:
            frames = "every frame" if self.period == 1 else f"one frame in {self.period}"
            return f"{codebooks}, {frames}"
        return f"{self.keep.mean():.1%} of {codebooks}, chosen by the model"


def compress_with(
    compressor: Compressor,
    clip: Clip,
    *,
    codebooks: int | None = None,
    period: int | None = None,
    share: float | None = None,
    seed: int = 0,
    with_model: bool = False,
) -> Setting:
    """Compress with a given setting; without one all tokens are kept.

    Args:
      compressor, clip, seed, with_model: as for `Compressor.compress`.
      codebooks: keep the first so many.
      period: keep every so many frames.
      share: instead of a grid, keep this share of the coarse tokens, chosen by the model.

    Raises:
      InputError: codebooks or period out of range.
    """
    if share is not None:
        keep = order_of_worth(compressor.model, clip.tokens) < share
        return _compressed(compressor, clip, keep, 0, seed, with_model)
    n = compressor.n_codebooks
    codebooks, period = codebooks if codebooks is not None else n, 1 if period is None else period
    if not 1 <= codebooks <= n:
        raise InputError(f"codebooks is {codebooks}; the model has 1 to {n}.")
    if not 1 <= period <= MAX_PERIOD:
        raise InputError(f"period is {period}; it must be from 1 to {MAX_PERIOD}.")
    keep = grid(codebooks, clip.tokens.shape[-1], period)
    return _compressed(compressor, clip, keep, period, seed, with_model)


def compress_within(
    compressor: Compressor,
    clip: Clip,
    bitrate: float,
    *,
    seed: int = 0,
    with_model: bool = False,
    on_progress: Progress | None = None,
) -> Setting:
    """The best setting whose file takes at most `bitrate` bits per second, header included.

    For every number of codebooks the shortest period that fits is tried, and the largest share
    that the model may choose; each is generated again from 10 s of the clip, and the least mel
    distance to the clip wins.

    Args:
      bitrate: in bits per second.
      on_progress: called with the stage "trials".
      Others as for `Compressor.compress`.

    Raises:
      InputError: no setting fits.
    """
    seconds = clip.n_samples / compressor.model.codec.sample_rate
    budget = math.floor(bitrate * seconds / 8)
    settings = _fitting(compressor, clip, budget, seed, with_model)
    if not settings:
        raise InputError(
            f"{bitrate:g} bit/s leave {budget} bytes for {seconds:.2f} s, and the header alone "
            f"takes {HEADER_BYTES}; give a higher bitrate or a longer clip."
        )
    distances = []
    for i, setting in enumerate(settings):
        if len(settings) > 1:
            distances.append(_trial(compressor, clip, setting, seed))
        if on_progress is not None:
            on_progress("trials", i + 1, len(settings))
    return settings[int(np.argmin(distances)) if distances else 0]


def _fitting(
    compressor: Compressor, clip: Clip, budget: int, seed: int, with_model: bool
) -> list[Setting]:
    """Settings whose files have at most `budget` bytes and none of which contains another."""
    settings: list[Setting] = []
    for codebooks in range(compressor.n_codebooks, 0, -1):
        # More codebooks in every frame kept here have been tried before.
        stop = min((s.period for s in settings), default=MAX_PERIOD + 1)
        setting = _shortest_period(compressor, clip, codebooks, stop, budget, seed, with_model)
        if setting is not None:
            settings.append(setting)
    n_coarse = compressor.model.coarse.config.n_codebooks
    if any(s.period == 1 and len(s.keep) >= n_coarse for s in settings):
        return settings  # which has all that the model may choose from
    chosen = _largest_share(compressor, clip, budget, seed, with_model)
    return settings if chosen is None else [*settings, chosen]


def _shortest_period(
    compressor: Compressor, clip: Clip, codebooks: int, stop: int, budget: int, seed: int,
    with_model: bool,
) -> Setting | None:  # fmt: skip
    """By bisection among the periods below `stop`."""

    def of(period: int) -> Setting:
        keep = grid(codebooks, clip.tokens.shape[-1], period)
        return _compressed(compressor, clip, keep, period, seed, with_model)

    best, low, high = None, 1, stop - 1
    while low <= high:
        period = (low + high) // 2
        setting = of(period)
        if len(setting.data) <= budget:
            best, high = setting, period - 1
        else:
            low = period + 1
    return best


def _largest_share(
    compressor: Compressor, clip: Clip, budget: int, seed: int, with_model: bool
) -> Setting | None:
    """By bisection; None if nothing or everything would be kept."""
    order = order_of_worth(compressor.model, clip.tokens)
    best, low, high = None, 1, SHARE_STEPS - 1
    while low <= high:
        middle = (low + high) // 2
        keep = order < middle / SHARE_STEPS
        setting = _compressed(compressor, clip, keep, 0, seed, with_model)
        if len(setting.data) <= budget:
            best, low = setting, middle + 1
        else:
            high = middle - 1
    return best


def _compressed(
    compressor: Compressor, clip: Clip, keep: np.ndarray, period: int, seed: int, with_model: bool
) -> Setting:
    data = compressor.compress(clip, keep, period=period, seed=seed, with_model=with_model)
    return Setting(keep, period, data)


def _trial(compressor: Compressor, clip: Clip, setting: Setting, seed: int) -> float:
    """Mel distance of the middle of the clip to what would be heard instead."""
    codec = compressor.model.codec
    n_frames = clip.tokens.shape[-1]
    length = min(n_frames, math.ceil(TRIAL_SECONDS * codec.frame_rate))
    start = (n_frames - length) // 2
    span = slice(start, start + length)
    part = dataclasses.replace(
        clip, tokens=clip.tokens[..., span], n_samples=length * codec.hop_length, audio=None
    )
    made = compressor.generate(part, setting.keep[:, span], seed)
    heard = np.asarray(codec.decode(made.tokens[0]))
    if clip.audio is not None:
        wanted = clip.audio.samples[:, start * codec.hop_length :][:, : heard.shape[1]]
    else:
        wanted = np.asarray(codec.decode(part.tokens))
    pair = (resample(mono(Audio(x, codec.sample_rate)), SAMPLE_RATE) for x in (wanted, heard))
    reference, other = (audio.samples[0] for audio in pair)
    return mel_distance(reference, other)
