"""Random excerpts of tokenised tracks, by a function of (seed, example number) only.

Example n of a run is always the same excerpt, whatever ran before, however many processes read:
batch s holds examples s·B … s·B+B−1, so the step number is the whole state of the data.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import grain.python as grain
import numpy as np

from codec_bridge.errors import InputError
from vampnet_jax.training.loudness import excerpt_loudness
from vampnet_jax.training.tokens import Manifest, Track, TrackReader

MAX_REDRAWS = 8
"""How often a quiet excerpt is drawn again; the last one is taken as it is."""
HELD_OUT = 0.05
"""Share of tracks held out for validation where the folder has no splits."""
ENDLESS = 2**60
"""Examples in all epochs together: without a limit Grain's count overflows in batches of one."""


def choose_tracks(manifest: Manifest, split: str) -> list[Track]:
    """The tracks of `train` or `validation`.

    In a folder without splits, one in twenty tracks (at least one, if there are two or more) is
    held out for validation: those whose names have the smallest hash.
    """
    if any(track.split for track in manifest.tracks):
        return [track for track in manifest.tracks if track.split == split]
    ranked = sorted(manifest.tracks, key=lambda t: hashlib.sha256(t.name.encode()).digest())
    held_out = max(1, round(HELD_OUT * len(ranked))) if len(ranked) > 1 else 0
    names = {track.name for track in ranked[:held_out]}
    return [track for track in manifest.tracks if (track.name in names) == (split == "validation")]


@dataclasses.dataclass(frozen=True)
class Excerpt:
    """Where an excerpt is."""

    track: int
    start: int


class RandomExcerpts:
    """Draws excerpts such that every part of every track comes once an epoch.

    An epoch has one place per window of each track, in a shuffled order; the excerpt begins
    anywhere in its place. Quiet ones are drawn again, anywhere.

    Args:
      reader: the tracks, all at least `window` frames long.
      n_codebooks: how many codebooks to return.
      window: frames per excerpt.
      min_loudness: LUFS before normalising; quieter excerpts are redrawn at most eight times.
      seed: decides the draws.
    """

    def __init__(
        self,
        reader: TrackReader,
        n_codebooks: int,
        window: int,
        min_loudness: float,
        seed: int,
    ) -> None:
        self.reader = reader
        self.n_codebooks = n_codebooks
        self.window = window
        self.min_loudness = min_loudness
        self.seed = seed
        frames = np.array([track.frames for track in reader.tracks])
        if not len(frames) or frames.min() < window:
            raise ValueError("every track must be at least a window long")
        self._frames = frames
        self._ends = np.cumsum(frames // window)

    @property
    def places(self) -> int:
        """Examples per epoch."""
        return int(self._ends[-1])

    def draw(self, example: int, place: int) -> np.ndarray:
        """Tokens int32 `[C, window]` of example number `example`, which begins in `place`."""
        rng = np.random.Generator(np.random.Philox(key=[self.seed, example]))
        for _ in range(MAX_REDRAWS + 1):
            excerpt = self._begin(place, rng)
            stop = excerpt.start + self.window
            tokens, loudness = self.reader.read(excerpt.track, excerpt.start, stop)
            frame_rate = self.reader.manifest.codec.frame_rate
            if excerpt_loudness(loudness, frame_rate) >= self.min_loudness:
                break
            place = int(rng.integers(self.places))
        return tokens[: self.n_codebooks]

    def _begin(self, place: int, rng: np.random.Generator) -> Excerpt:
        track = int(np.searchsorted(self._ends, place, side="right"))
        first = int(self._ends[track - 1]) if track else 0
        places = int(self._ends[track]) - first
        room = int(self._frames[track]) - self.window  # starts 0 … room are possible
        low = (place - first) * (room + 1) // places
        high = max((place - first + 1) * (room + 1) // places, low + 1)
        return Excerpt(track, int(rng.integers(low, high)))

    def batches(
        self, batch_size: int, *, threads: int = 1, ahead: int = 4
    ) -> grain.DatasetIterator:
        """An endless iterator of int32 `[B, C, window]`, read ahead by threads.

        `iterator.set_state({"next_index": s})` goes to the batch of step s.
        """
        examples = (
            grain.MapDataset.range(self.places)
            .shuffle(seed=self.seed % 2**32)
            .repeat(ENDLESS // self.places)
            .map_with_index(self.draw)
            .batch(batch_size)
        )
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        return iter(examples.to_iter_dataset(options))


def fixed_excerpts(
    reader: TrackReader, n_codebooks: int, window: int, count: int
) -> tuple[np.ndarray, list[str]]:
    """Evenly spaced excerpts, the same every time, each source with its share of the seconds.

    Every source has at least one if `count` allows.

    Returns:
      tokens int32 `[count, C, window]` and the source of each.
    """
    by_source: dict[str, list[int]] = {}
    for index, track in enumerate(reader.tracks):
        by_source.setdefault(track.source, []).append(index)
    shares = _shares([sum(reader.tracks[i].frames for i in v) for v in by_source.values()], count)
    tokens: list[np.ndarray] = []
    sources: list[str] = []
    for (source, indices), share in zip(by_source.items(), shares, strict=True):
        rooms = np.array([reader.tracks[i].frames - window + 1 for i in indices])
        ends = np.cumsum(rooms)
        for position in (np.arange(share) + 0.5) / max(share, 1) * ends[-1]:
            at = int(np.searchsorted(ends, position, side="right"))
            start = int(position - (ends[at] - rooms[at]))
            tokens.append(reader.read(indices[at], start, start + window)[0][:n_codebooks])
            sources.append(source)
    return np.stack(tokens), sources


def _shares(amounts: Sequence[int], count: int) -> list[int]:
    """Divide `count` in proportion to the amounts, each at least one where there are enough."""
    total = sum(amounts)
    shares = [max(1, int(count * amount / total)) for amount in amounts]
    while sum(shares) != count and (sum(shares) < count or max(shares) > 1):
        wanted = np.array(amounts) / total * count - np.array(shares)
        if sum(shares) < count:
            shares[int(np.argmax(wanted))] += 1
        else:
            wanted[np.array(shares) == 1] = np.inf
            shares[int(np.argmin(wanted))] -= 1
    return shares


def long_enough(tracks: Sequence[Track], window: int, what: str) -> tuple[list[Track], int]:
    """The tracks that hold a window, and how many do not.

    Raises:
      InputError: none does.
    """
    kept = [track for track in tracks if track.frames >= window]
    if not kept:
        longest = max((track.frames for track in tracks), default=0)
        raise InputError(
            f"None of the {len(tracks)} {what} tracks is as long as the window of {window} "
            f"frames (the longest has {longest}); tokenise longer audio or set a smaller --window."
        )
    return kept, len(tracks) - len(kept)
