"""Audio in, variations out: what `sample.py` does, as functions.

`vamp_audio` is the whole way; `encode`, `generate` and `decode` are its three parts, for
those who want the tokens or show progress. Source: VampNet, sections 3 and 4.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from codec_bridge import audio as signal
from codec_bridge.audio import Audio
from codec_bridge.errors import InputError
from vampnet_jax import masks
from vampnet_jax.prompts import DEFAULT_PRESET, Prompt, frames
from vampnet_jax.release import Model
from vampnet_jax.rhythm import Rhythm
from vampnet_jax.sampling import SamplingOptions
from vampnet_jax.vamping import vamp

LOUDNESS = -24.0
"""LUFS of what the models were trained on."""
MIN_SECONDS = 0.1
"""Shorter clips are refused: they hold a few frames at most."""
PASSAGE = 0.4
"""Seconds from which on what is kept has a loudness of its own (a block of BS.1770)."""
MAX_SECONDS = 3600
"""Longest continuation, and longest music from nothing."""
MAX_STRETCH = 100
"""More new frames between two of the input's are refused."""

Progress = Callable[[str, int, int], None]
"""Called with the stage ("encode", "coarse", "fine", "decode"), what is done and what there is."""


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
    """A recording as the model hears it."""

    tokens: np.ndarray
    """int32 `[channels, C, T]`."""
    n_samples: int
    """Length at the codec's rate; the last frame may be filled in part."""
    gain_db: float = 0.0
    """Gain that made the recording as loud as the training data."""
    loudness: float = math.nan
    """In LUFS with that gain; NaN where it is undefined (silence, clips under 0.4 s) or unknown."""
    audio: Audio | None = None
    """What was encoded, at the codec's rate with that gain; None if not at hand."""


@dataclasses.dataclass(frozen=True, eq=False)
class Edit:
    """What happens to a clip apart from its prompt."""

    stretch: int = 1
    """Slow down by repeating every frame this many times; all but the first copies are new."""
    extend: float = 0.0
    """Continue the clip by this many seconds."""
    feedback: int = 0
    """Vamp the result again this many times; each pass moves the periodic prompt."""
    mask: np.ndarray | None = None
    """A person's own mask, bool `[C, T]`, True = generate; together with the prompt a token is
    generated only if both say so."""

    def __post_init__(self) -> None:
        if not 1 <= self.stretch <= MAX_STRETCH:
            raise InputError(
                f"stretch is {self.stretch}; it must be a whole number from 1 to {MAX_STRETCH}."
            )
        if not 0 <= self.extend <= MAX_SECONDS:
            raise InputError(
                f"extend is {self.extend:g}; it must be from 0 to {MAX_SECONDS} seconds."
            )
        if self.feedback < 0:
            raise InputError(f"feedback is {self.feedback}; it must be 0 or more.")


NO_EDIT = Edit()


@dataclasses.dataclass(frozen=True, eq=False)
class Variations:
    """What `generate` made: N variations of one clip."""

    tokens: np.ndarray
    """int32 `[N, channels, C, T]`."""
    prompts: np.ndarray
    """int32 `[channels, C, T]`: the tokens that the first pass started from."""
    mask: np.ndarray
    """bool `[N, C, T]`: what the first pass generated."""
    replaced: np.ndarray
    """bool `[N, C, T]`: what any pass generated."""
    n_samples: int
    """Length of the audio at the codec's rate."""
    gain_db: float
    """As of the clip; `decode` takes it back."""
    loudness: float = math.nan
    """As of the clip."""
    unheard: tuple[str, ...] = ()
    """Of "onsets" and "beats", what the prompt asked for and the clip does not have."""


def vamp_audio(
    model: Model,
    audio: Audio,
    prompt: Prompt | None = None,
    *,
    seed: int,
    n_variations: int = 1,
    coarse: SamplingOptions | None = None,
    fine: SamplingOptions | None = None,
    stereo: bool = False,
    pitch: float = 0.0,
    edit: Edit = NO_EDIT,
    on_progress: Progress | None = None,
) -> list[Audio]:
    """Make variations of a recording.

    The recording is mixed to mono or to stereo, resampled to the codec's rate and brought to
    −24 LUFS. The result has the loudness of the input (where the prompt keeps 0.4 s or more: its
    level) and peaks of at most 1.

    Args:
      model: as `vampnet_jax.load` returns.
      audio: as `codec_bridge.audio.read` returns.
      prompt: what to keep of it; None is the model's preset medium-variation.
      seed: 0 to 2³²−1. Variation k depends on the seed and on k, not on how many there are.
      n_variations: N, made as one batch.
      coarse, fine: how to sample; None is as the model is best sampled.
      stereo: keep two channels apart (of more, the even and the odd ones are mixed) instead of
        mixing all. They share prompt and random numbers, so that what is alike in both stays alike.
      pitch: shift the input by this many semitones first, −12 to 12.
      edit: stretch, extend, feedback, own mask.
      on_progress: see `Progress`.

    Returns:
      N variations at `model.codec.sample_rate`, each as long as the input, times the stretch, plus
      the extension.

    Raises:
      InputError: audio or options that do not work.
    """
    if prompt is None:
        prompt = model.presets[DEFAULT_PRESET]
    clip = encode(model, audio, stereo=stereo, pitch=pitch, on_progress=on_progress)
    made = generate(
        model, clip, prompt, seed=seed, n_variations=n_variations, coarse=coarse, fine=fine,
        edit=edit, on_progress=on_progress,
    )  # fmt: skip
    return [decode(model, made, k, on_progress) for k in range(n_variations)]


def encode(
    model: Model,
    audio: Audio,
    *,
    stereo: bool = False,
    pitch: float = 0.0,
    on_progress: Progress | None = None,
) -> Clip:
    """Bring a recording to the codec's rate and to −24 LUFS, and turn it into tokens.

    Arguments as for `vamp_audio`.
    """
    check_recording(audio)
    audio = signal.stereo(audio) if stereo and audio.channels > 1 else signal.mono(audio)
    audio = signal.pitch_shift(signal.resample(audio, model.codec.sample_rate), pitch)
    audio, gain_db = signal.normalise(audio, LOUDNESS)
    measured = signal.loudness(audio)
    encoded = np.asarray(model.codec.encode(audio.samples, progress=_stage(on_progress, "encode")))
    return Clip(
        tokens=encoded[:, : n_codebooks(model)],
        n_samples=audio.samples.shape[1],
        gain_db=gain_db,
        loudness=measured if math.isfinite(measured) else math.nan,
        audio=audio,
    )


def generate(
    model: Model,
    clip: Clip | None,
    prompt: Prompt,
    *,
    seed: int,
    n_variations: int = 1,
    coarse: SamplingOptions | None = None,
    fine: SamplingOptions | None = None,
    edit: Edit = NO_EDIT,
    on_progress: Progress | None = None,
) -> Variations:
    """Fill in what the prompt does not keep, coarse then fine, once per pass.

    Args:
      clip: what to vamp; None makes `edit.extend` seconds from nothing.
      Others as for `vamp_audio`.
    """
    codec = model.codec
    if clip is None:
        clip = Clip(np.zeros((1, n_codebooks(model), 0), np.int32), 0)
    channels, n_rows, n_frames = clip.tokens.shape
    rhythm = None
    if prompt.onset or prompt.follows_beats:
        rhythm = prompt.listen(_mono(model, clip), codec.sample_rate, codec.hop_length)
    own_mask = None if edit.mask is None else jnp.asarray(edit.mask, bool)
    if own_mask is not None and own_mask.shape != (n_rows, n_frames):
        raise InputError(
            f"the mask has shape {own_mask.shape}; this clip needs {(n_rows, n_frames)}."
        )
    n_new = frames(edit.extend, codec.frame_rate)

    def mask_of_variation(key: jax.Array, pass_index: int) -> jax.Array:
        """bool `[C, T·stretch + new]`."""
        shape = (n_rows, n_frames)
        mask = prompt.mask(
            shape, key, frame_rate=codec.frame_rate, rhythm=rhythm, pass_index=pass_index
        )
        if own_mask is not None:
            mask &= own_mask
        if n_new and clip.n_samples % codec.hop_length:
            # Silence fills the last frame up; kept, it would be a gap before the continuation.
            mask = mask.at[:, -1].set(True)
        _, mask = masks.stretch(jnp.zeros(shape, jnp.int32), mask, edit.stretch)
        return jnp.concatenate([mask, jnp.ones((n_rows, n_new), bool)], axis=1)

    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(n_variations))
    both = jax.vmap(jax.random.split)(keys)
    prompt_keys, vamp_keys = both[:, 0], both[:, 1]
    masks_of_pass = jax.vmap(mask_of_variation, (0, None))

    start = np.repeat(clip.tokens, edit.stretch, axis=-1)
    start = np.pad(start, [(0, 0), (0, 0), (0, n_new)])
    # A variation's channels are neighbours in the batch and share mask and key.
    tokens = jnp.asarray(np.tile(start, (n_variations, 1, 1)))
    masks_of_passes = [masks_of_pass(prompt_keys, i) for i in range(edit.feedback + 1)]
    for pass_index, mask in enumerate(masks_of_passes):
        pass_keys = jax.vmap(jax.random.fold_in, (0, None))(vamp_keys, pass_index)
        tokens = vamp(
            model,
            tokens,
            jnp.repeat(mask, channels, axis=0),
            jnp.repeat(pass_keys, channels, axis=0),
            coarse=coarse,
            fine=fine,
            on_progress=_of_pass(pass_index, len(masks_of_passes), on_progress),
        )
    return Variations(
        tokens=np.asarray(tokens).reshape(n_variations, *start.shape),
        prompts=start,
        mask=np.asarray(masks_of_passes[0]),
        replaced=np.logical_or.reduce([np.asarray(mask) for mask in masks_of_passes]),
        n_samples=clip.n_samples * edit.stretch + round(edit.extend * codec.sample_rate),
        gain_db=clip.gain_db,
        loudness=clip.loudness,
        unheard=_unheard(prompt, rhythm),
    )


def decode(
    model: Model, made: Variations, index: int, on_progress: Progress | None = None
) -> Audio:
    """The sound of one variation, as loud as the input was.

    A passage that is kept must keep its level, so there the gain of the clip is taken back and that
    is all; otherwise the music is first brought to the loudness that the clip had.
    """
    samples = model.codec.decode(made.tokens[index], progress=_stage(on_progress, "decode"))
    audio = Audio(np.asarray(samples)[:, : made.n_samples], model.codec.sample_rate)
    change = 0.0
    if longest_run(~made.replaced[index].any(axis=0)) / model.codec.frame_rate < PASSAGE:
        change = made.loudness - signal.loudness(audio)
    gain_db = (change if math.isfinite(change) else 0.0) - made.gain_db
    return signal.apply_gain(audio, gain_db)[0]


def longest_run(chosen: np.ndarray) -> int:
    """The most neighbours that are all True; bool `[T]`."""
    borders = np.flatnonzero(np.diff(chosen, prepend=False, append=False))
    return int(np.max(np.diff(borders)[::2], initial=0))


def check_recording(audio: Audio) -> None:
    """Raise InputError for audio that cannot be vamped."""
    if audio.seconds < MIN_SECONDS:
        raise InputError(
            f"the audio lasts only {audio.seconds:.3f} s; give at least {MIN_SECONDS:g} s."
        )
    if not np.isfinite(audio.samples).all():
        raise InputError("the audio has samples that are not finite (NaN or infinity).")


def frames_of_recording(model: Model, n_samples: int, sample_rate: int) -> int:
    """T, frames that `encode` will make of a recording of this length."""
    resampled = math.floor(n_samples * model.codec.sample_rate / sample_rate + 0.5)
    return -(-resampled // model.codec.hop_length)


def n_codebooks(model: Model) -> int:
    """C, codebooks that the two models speak together."""
    return model.fine.config.n_codebooks


def _unheard(prompt: Prompt, rhythm: Rhythm | None) -> tuple[str, ...]:
    if rhythm is None:
        return ()
    asked = {"onsets": bool(prompt.onset), "beats": prompt.follows_beats}
    return tuple(sort for sort in asked if asked[sort] and not len(getattr(rhythm, sort)))


def _mono(model: Model, clip: Clip) -> np.ndarray:
    """float32 `[samples]`, from the tokens if there is nothing else."""
    if clip.audio is not None:
        return clip.audio.samples.mean(axis=0)
    return np.asarray(model.codec.decode(clip.tokens))[:, : clip.n_samples].mean(axis=0)


def _stage(on_progress: Progress | None, stage: str) -> Callable[[int, int], None] | None:
    if on_progress is None:
        return None
    return lambda done, total: on_progress(stage, done, total)


def _of_pass(pass_index: int, n_passes: int, on_progress: Progress | None) -> Progress | None:
    """Of windows done in one pass, how many that makes of those of all passes."""
    if on_progress is None:
        return None
    return lambda stage, done, total: on_progress(
        stage, pass_index * total + done, n_passes * total
    )
