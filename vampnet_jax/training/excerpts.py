"""Random excerpts of tokenised tracks, by a function of (seed, example number) only.

Example n of a run is always the same excerpt, whatever ran before, however many processes read:
step s takes examples s·B … s·B+B−1 (`examples_of_step`), so the step number is the whole state of
the data, and a process that holds some rows of the batch reads those and no others.
"""

import dataclasses
import functools
import hashlib
import math
import zlib
from collections.abc import Collection, Mapping, Sequence

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

    In a folder without splits, about one track in twenty is held out for validation: those whose
    names have a hash in the lowest twentieth, so that a track stays where it is when others come.
    If there is none, it is that of the lowest hash, if there are two tracks or more.
    """
    if any(track.split for track in manifest.tracks):
        return [track for track in manifest.tracks if track.split == split]
    hashes = {t.name: hashlib.sha256(t.name.encode()).digest() for t in manifest.tracks}
    limit = int(HELD_OUT * 2**32).to_bytes(4, "big")
    names = {name for name, digest in hashes.items() if digest < limit}
    if not names or len(names) == len(hashes):
        names = {min(hashes, key=hashes.__getitem__)} if len(hashes) > 1 else set()
    return [track for track in manifest.tracks if (track.name in names) == (split == "validation")]


def check_weights(
    weights: Mapping[str, float], tracks: Sequence[Track], all_sources: Collection[str] = ()
) -> None:
    """Check the weights of sources.

    Args:
      weights: by source.
      tracks: those that are trained on.
      all_sources: those of shorter tracks, too.

    Raises:
      InputError: a weight of an unknown source, or below 0 or not finite, or none above 0.
    """
    sources = sorted({track.source for track in tracks})
    for source, weight in weights.items():
        if source in all_sources and source not in sources:
            raise InputError(
                f"Source {source!r} cannot be weighed: none of its training tracks is as long as a "
                "window."
            )
        if source not in sources:
            known = ", ".join(sources)
            raise InputError(f"There is no source {source!r} to weigh; there are: {known}.")
        if not (math.isfinite(weight) and weight >= 0):
            raise InputError(f"The weight of source {source!r} is {weight}; give 0 or more.")
    if not any(weights.get(source, 1.0) for source in sources):
        raise InputError("Every source has weight 0; leave one at least above 0.")


@dataclasses.dataclass(frozen=True)
class Excerpt:
    """Where an excerpt is."""

    track: int
    """Index into the reader's tracks."""
    start: int
    """Its first frame."""


def examples_of_step(
    step: int, batch_size: int, process_index: int = 0, process_count: int = 1
) -> range:
    """The numbers of the examples that one of P processes reads for a step.

    The batch of step s is examples s·B … s·B+B−1; process p has its rows [p·B/P, (p+1)·B/P).

    Raises:
      InputError: the processes cannot have equally many rows.
    """
    rows = _rows(batch_size, process_count)
    first = step * batch_size + process_index * rows
    return range(first, first + rows)


def _rows(batch_size: int, process_count: int) -> int:
    if batch_size % process_count:
        raise InputError(
            f"batch_size {batch_size} cannot be divided evenly among {process_count} processes; "
            "choose a multiple of their number."
        )
    return batch_size // process_count


class RandomExcerpts:
    """Draws excerpts such that every part of every track comes once an epoch.

    An epoch has one place per window of each track, in a shuffled order; the excerpt begins
    anywhere in its place. Quiet ones are drawn again, anywhere.

    With weights every source has epochs of its own. Their excerpts alternate evenly in proportion
    to weight × places, so already short stretches of the run have the mixture; quiet ones are
    drawn again from their own source.

    Args:
      reader: the tracks, all at least `window` frames long.
      n_codebooks: how many codebooks to return.
      window: frames per excerpt.
      min_loudness: LUFS before normalising; quieter excerpts are redrawn at most eight times.
      seed: decides the draws.
      weights: source → how many times as often its music comes as by its length; 1 for a source
        that is not named, 0 leaves one out.

    Raises:
      InputError: impossible weights.
    """

    def __init__(
        self,
        reader: TrackReader,
        n_codebooks: int,
        window: int,
        min_loudness: float,
        seed: int,
        weights: Mapping[str, float] | None = None,
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
        self._groups: dict[str, np.ndarray] = {}  # places by source, where sources have weights
        check_weights(weights or {}, reader.tracks)
        if weights and any(weight != 1 for weight in weights.values()):
            self._order = self._mixed(weights)
        else:
            self._order = _endless(grain.MapDataset.range(self.places), seed)

    def _mixed(self, weights: Mapping[str, float]) -> grain.MapDataset:
        sources = np.array([track.source for track in self.reader.tracks])
        track = np.repeat(np.arange(len(sources)), self._frames // self.window)
        orders, shares = [], []
        for source in sorted(set(sources)):
            share = weights.get(source, 1.0)
            if share == 0:
                continue
            places = np.flatnonzero(sources[track] == source)
            self._groups[source] = places
            seed = self.seed + zlib.crc32(source.encode())
            orders.append(_endless(grain.MapDataset.source(places), seed))
            shares.append(share * len(places))
        return grain.MapDataset.mix(orders, shares)

    @property
    def places(self) -> int:
        """Examples per epoch."""
        return int(self._ends[-1])

    def excerpt(self, example: int) -> Excerpt:
        """Where example number `example` of the run is."""
        return self._draw(example)[0]

    def tokens(self, example: int) -> np.ndarray:
        """Tokens int32 `[C, window]` of example number `example` of the run."""
        return self._draw(example)[1]

    def _draw(self, example: int) -> tuple[Excerpt, np.ndarray]:
        rng = np.random.Generator(np.random.Philox(key=[self.seed, example]))
        place = int(self._order[example])
        for _ in range(MAX_REDRAWS + 1):
            excerpt = self._begin(place, rng)
            stop = excerpt.start + self.window
            tokens, loudness = self.reader.read(excerpt.track, excerpt.start, stop)
            frame_rate = self.reader.manifest.codec.frame_rate
            if excerpt_loudness(loudness, frame_rate) >= self.min_loudness:
                break
            if self._groups:
                group = self._groups[self.reader.tracks[excerpt.track].source]
                place = int(group[rng.integers(len(group))])
            else:
                place = int(rng.integers(self.places))
        return excerpt, tokens[: self.n_codebooks]

    def _begin(self, place: int, rng: np.random.Generator) -> Excerpt:
        track = int(np.searchsorted(self._ends, place, side="right"))
        first = int(self._ends[track - 1]) if track else 0
        places = int(self._ends[track]) - first
        room = int(self._frames[track]) - self.window  # starts 0 … room are possible
        low = (place - first) * (room + 1) // places
        high = max((place - first + 1) * (room + 1) // places, low + 1)
        return Excerpt(track, int(rng.integers(low, high)))

    def batches(
        self,
        batch_size: int,
        *,
        process_index: int = 0,
        process_count: int = 1,
        threads: int = 1,
        ahead: int = 4,
    ) -> grain.DatasetIterator:
        """An endless iterator of this process's rows, int32 `[B/P, C, window]`, read ahead.

        `iterator.set_state({"next_index": s})` goes to the batch of step s.

        Args:
          batch_size: B, of all processes together.
          process_index, process_count: p and P; the process reads rows [p·B/P, (p+1)·B/P) of
            every batch. P may be another one after any step.
          threads: that read.
          ahead: batches in advance.

        Raises:
          InputError: the batch cannot be divided evenly.
        """
        share = _Share(self, batch_size, process_index, process_count)
        local = grain.MapDataset.source(share).batch(share.rows)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        return iter(local.to_iter_dataset(options))


class _Share:
    """The examples of one process as one sequence."""

    def __init__(self, excerpts: RandomExcerpts, batch_size: int, index: int, count: int) -> None:
        self.rows = _rows(batch_size, count)
        self._of_step = functools.partial(
            examples_of_step, batch_size=batch_size, process_index=index, process_count=count
        )
        self._excerpts = excerpts

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, number: int) -> np.ndarray:
        step, row = divmod(int(number), self.rows)
        return self._excerpts.tokens(self._of_step(step)[row])


def _endless(places: grain.MapDataset, seed: int) -> grain.MapDataset:
    return places.shuffle(seed=seed % 2**32).repeat(ENDLESS // len(places))


def fixed_excerpts(
    reader: TrackReader, n_codebooks: int, window: int, count: int
) -> tuple[np.ndarray, list[str]]:
    """Evenly spaced excerpts, the same every time, each source with its share of the seconds.

    Every source has at least one, even if there are then more than `count`.

    Returns:
      tokens int32 `[count or more, C, window]` and the source of each.
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
    """Divide `count` in proportion to the amounts, but each is at least one."""
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
            f"frames (the longest has {longest}); tokenise longer audio or set a smaller "
            "window_seconds."
        )
    return kept, len(tracks) - len(kept)
