"""`Prompt`: what to keep of the input, as the options of one run, and the presets.

Unlike the functions in `vampnet_jax.masks`, which speak in frames, a prompt gives spans of time in
seconds (as a person marks them) and becomes a mask once the frame rate is known. Periods and
widths are frames in both. Source: VampNet, sections 3.2 and 4, and the presets of its app.
"""

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from codec_bridge.errors import InputError
from vampnet_jax import masks
from vampnet_jax.rhythm import Rhythm, beat, choose_beats, find_beats, find_onsets, onset

UPPER_CODEBOOKS = 4
"""First codebook that sparse prompts leave to the model, as in the original's presets."""

MAX_WHOLE = 10**9
"""The largest number of frames or codebooks; JAX counts them in 32 bits."""


BY_TIME = ("periodic", "prefix", "suffix", "onset", "beat", "beat_before")
"""Options that, if above 0, keep tokens by their time; so does random below 1."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What to keep; everything else is generated. Without arguments it keeps nothing.

    Prompts that keep are united: random, prefix and suffix, periodic, onset and beat. From that
    `dropout` takes frames away again; `keep_codebooks` and `upper_codebooks` then decide over whole
    codebooks; and whatever lies outside of `regions`, if there are any, is kept in all codebooks.
    """

    periodic: int = 0
    """Keep every n-th frame; 0 keeps none, 1 all."""
    width: int = 1
    """Frames kept around each periodic frame."""
    offset: int | None = None
    """Frames by which the periodic prompt is moved; None draws it from the key."""
    prefix: float = 0.0
    """Keep the first seconds."""
    suffix: float = 0.0
    """Keep the last seconds."""
    regions: tuple[tuple[float, float], ...] = ()
    """Generate only these spans, each (start, stop) in seconds; keep everything outside."""
    random: float = 1.0
    """Keep each token with probability 1 − random."""
    onset: int = 0
    """Keep this many frames on each side of every onset."""
    beat: float = 0.0
    """Keep this many seconds after every beat."""
    beat_before: float = 0.0
    """Keep this many seconds before every beat."""
    beat_downbeats: bool = False
    """Follow only the first beat of each bar."""
    beat_every: int = 1
    """Follow only every n-th of these beats."""
    beat_dropout: float = 0.0
    """Leave out each beat with this probability."""
    dropout: float = 0.0
    """Share of the kept frames that are generated after all."""
    keep_codebooks: int = 0
    """Keep all of the first n codebooks."""
    upper_codebooks: int | None = None
    """Generate all of the codebooks from this one on. None: 4 (as in the original's presets), or
    keep_codebooks if that is more, with a period above 1, random, onset or beat; otherwise kept
    time is kept in all codebooks."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_type(field, getattr(self, field.name))
        for name in ("periodic", "onset", "keep_codebooks", "upper_codebooks", "offset"):
            _at_least(name, getattr(self, name), 0)
        for name in ("prefix", "suffix", "beat", "beat_before"):
            _at_least(name, getattr(self, name), 0)
        for name in ("width", "beat_every"):
            _at_least(name, getattr(self, name), 1)
        for name in ("random", "dropout", "beat_dropout"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise InputError(f"{name} is {value}; it must be from 0 to 1.")
        if not self.periodic and (self.width != 1 or self.offset is not None):
            raise InputError("width and offset need periodic, whose frames they change.")
        if not self.follows_beats and (
            self.beat_downbeats or self.beat_every != 1 or self.beat_dropout
        ):
            raise InputError(
                "beat_downbeats, beat_every and beat_dropout need beat or beat_before."
            )
        for start, stop in self.regions:
            if not (start >= 0 and math.isfinite(stop)):
                raise InputError(f"region {start:g}:{stop:g} must lie at 0 seconds or later.")
            if not start < stop:
                raise InputError(
                    f"region {start:g}:{stop:g} ends before it starts; write it as START:STOP."
                )

    @property
    def first_generated_codebook(self) -> int | None:
        """`upper_codebooks`, or what stands for it if that was left out."""
        sparse = self.periodic > 1 or self.onset or self.follows_beats or self.random < 1
        if self.upper_codebooks is None and sparse:
            return max(UPPER_CODEBOOKS, self.keep_codebooks)
        return self.upper_codebooks

    @property
    def keeps_frames(self) -> bool:
        """Whether it keeps any tokens by their time, if the clip has onsets and beats."""
        return self.random < 1 or any(getattr(self, name) for name in BY_TIME)

    @property
    def follows_beats(self) -> bool:
        """Whether beats must be found."""
        return self.beat > 0 or self.beat_before > 0

    def describe(self) -> str:
        """What differs from a prompt that keeps nothing, in one line."""
        nothing = Prompt()
        given = dataclasses.asdict(self).items()
        return ", ".join(f"{k} {v}" for k, v in given if v != getattr(nothing, k)) or "nothing"

    def check_duration(self, seconds: float) -> None:
        """Raise InputError if a span of time does not fit into a clip of this length."""
        for name in ("prefix", "suffix"):
            if getattr(self, name) > seconds:
                raise InputError(
                    f"{name} is {getattr(self, name):g} s but the clip lasts only {seconds:.2f} s."
                )
        for start, stop in self.regions:
            if stop > seconds + 0.005:  # what a display rounds to two digits
                raise InputError(
                    f"region {start:g}:{stop:g} reaches beyond the clip, which ends at "
                    f"{seconds:.2f} s."
                )

    def listen(self, audio: np.ndarray, sample_rate: int, hop_length: int) -> Rhythm:
        """Find the onsets and beats that this prompt needs (others stay empty).

        Args:
          audio: float `[samples]`, mono.
          sample_rate: in Hz.
          hop_length: samples per codec frame.
        """
        nothing = np.zeros(0, int)
        onsets = find_onsets(audio, sample_rate, hop_length) if self.onset else nothing
        beats, downbeats = (nothing, nothing.astype(bool))
        if self.follows_beats:
            beats, downbeats = find_beats(audio, sample_rate, hop_length)
        return Rhythm(onsets, beats, downbeats)

    def mask(
        self,
        shape: masks.Shape,
        key: jax.Array,
        *,
        frame_rate: float,
        rhythm: Rhythm | None = None,
        pass_index: int = 0,
    ) -> jax.Array:
        """The mask of this prompt: True = generate.

        Works under jit and vmap over keys.

        Args:
          shape: `(C, T)`, or with leading axes, which then draw independently (but share
            one offset of the periodic prompt).
          key: for what is drawn; the same in all passes of one variation.
          frame_rate: codec frames per second; seconds are rounded up to whole frames.
          rhythm: what `listen` returned; needed with onset or beat.
          pass_index: counts the passes of feedback. Each pass rolls the periodic prompt to other
            frames and draws anew.

        Returns:
          bool of that shape.
        """
        offset_key, key = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1 + pass_index)
        random_key, dropout_key, beat_key = jax.random.split(key, 3)
        mask = masks.full(shape)
        if self.random < 1:
            mask &= masks.random(random_key, shape, self.random)
        if self.prefix or self.suffix:
            prefix, suffix = (frames(s, frame_rate) for s in (self.prefix, self.suffix))
            mask &= masks.inpaint(shape, prefix, suffix)
        if self.periodic:
            drawn = jax.random.randint(offset_key, (), 0, self.periodic)
            start = drawn if self.offset is None else self.offset
            roll = start + pass_index * _roll_per_pass(self.periodic)
            mask &= masks.periodic(shape, self.periodic, self.width, roll)
        if (self.onset or self.follows_beats) and rhythm is None:
            raise ValueError("a prompt with onset or beat needs the rhythm that listen() finds")
        if self.onset and rhythm is not None:
            mask &= onset(shape, rhythm.onsets, self.onset)
        if self.follows_beats and rhythm is not None:
            before, after = (frames(s, frame_rate) for s in (self.beat_before, self.beat))
            chosen = choose_beats(rhythm, self.beat_downbeats, self.beat_every)
            mask &= beat(shape, chosen, before, after, key=beat_key, dropout=self.beat_dropout)
        if self.dropout:
            mask = masks.dropout(dropout_key, mask, self.dropout)
        mask = masks.keep_codebooks(mask, self.keep_codebooks)
        if self.first_generated_codebook is not None:
            mask = masks.upper_codebooks(mask, self.first_generated_codebook)
        if self.regions:
            spans = [
                (math.floor(round(start * frame_rate, 6)), frames(stop, frame_rate))
                for start, stop in self.regions
            ]
            mask &= masks.regions(shape, spans)
        return mask


def preset(name: str, presets: Mapping[str, Prompt]) -> Prompt:
    """A prompt by name, of those of a model; InputError if there is none."""
    if name not in presets:
        raise InputError(f"there is no preset {name!r}; choose one of {', '.join(presets)}.")
    return presets[name]


def frames(seconds: float, frame_rate: float) -> int:
    """Whole frames that cover a time: 3 s at 57.42 frames/s are 173."""
    return math.ceil(round(seconds * frame_rate, 6))


def _roll_per_pass(period: int) -> int:
    """How far feedback moves the periodic prompt per pass, such that passes meet all offsets.

    Near the golden section of the period and without a common divisor.
    """
    steps = range(max(1, round(0.382 * period)), period + 1)
    return next(step for step in steps if math.gcd(step, period) == 1)


def _check_type(field: dataclasses.Field, value: Any) -> None:
    """Raise InputError if an option from a file is of another type than its field."""
    if field.type is bool:
        fits, sort = isinstance(value, bool), "true or false"
    elif field.type in (int, int | None, float):
        whole = field.type is not float
        fits = isinstance(value, numbers.Integral if whole else numbers.Real)
        fits = fits and not isinstance(value, bool)
        sort = "a whole number" if whole else "a number"
        fits = fits or (value is None and field.type == int | None)
    else:  # spans
        fits = all(len(x) == 2 and all(isinstance(t, numbers.Real) for t in x) for x in value)
        sort = "pairs of numbers"
    if not fits:
        raise InputError(f"{field.name} is {value!r}; it must be {sort}.")
    if sort == "a whole number" and value is not None and value > MAX_WHOLE:
        raise InputError(f"{field.name} is {value}; it must be at most {MAX_WHOLE}.")


def _at_least(name: str, value: float | None, least: float) -> None:
    if value is not None and not (least <= value < math.inf):
        raise InputError(f"{name} is {value}; it must be at least {least}.")


PRESETS: dict[str, Prompt] = {
    "timbre-transfer": Prompt(periodic=2, upper_codebooks=1),
    "small-variation": Prompt(periodic=5, upper_codebooks=4),
    "medium-variation": Prompt(periodic=7, upper_codebooks=4),
    "large-variation": Prompt(periodic=13, dropout=0.2, upper_codebooks=4),
    "beat-small-variation": Prompt(periodic=7, beat=0.05, upper_codebooks=4),
    "beat-medium-variation": Prompt(periodic=13, beat=0.05, upper_codebooks=4),
    "beat-large-variation": Prompt(periodic=0, beat=0.08, upper_codebooks=4),
    "unconditional": Prompt(periodic=0, upper_codebooks=1),
}
"""Prompts by name, as in the original's app; a model may have others of the same names."""

DEFAULT_PRESET = "medium-variation"
