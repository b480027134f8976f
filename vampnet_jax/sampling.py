"""Iterative decoding: masked tokens are filled in a few at a time (VampNet, section 3.3).

One step draws a token for every masked position, keeps those the model is surest of, and masks
the rest again; how many stay masked falls along a cosine (MaskGIT: Chang et al. 2022). All steps
are one compiled program per (shape, steps, order, codebook_steps, options in use); the values of
the others are traced, so changing them never recompiles. Ways that need fewer steps are options.
"""

import dataclasses
import functools
import numbers
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from codec_bridge.errors import InputError
from vampnet_jax import model, unmasking
from vampnet_jax.config import ModelConfig
from vampnet_jax.drawing import Drawn, draw
from vampnet_jax.filters import filter_logits
from vampnet_jax.keys import example_keys

SEGMENTS = 3
"""See `decode`; measured by `benchmarks/one_by_one.py`."""

_COUNT = (numbers.Integral, "a whole number of at least 1", lambda x: x >= 1)
_AMOUNT = (numbers.Real, "a number of at least 0", lambda x: 0 <= x < np.inf)
_SHARE = (numbers.Real, "a number from 0 to 1", lambda x: 0 <= x <= 1)
_TEMPERATURE = (
    numbers.Real,
    "above 0 (for the likeliest token at every step set sample_cutoff to 0)",
    lambda x: 0 < x < np.inf,
)
_FORMS = (
    ("steps", *_COUNT), ("top_k", *_COUNT), ("typical_min_tokens", *_COUNT),
    ("mask_temperature", *_AMOUNT), ("entropy_bound", *_AMOUNT), ("guidance", *_AMOUNT),
    ("sample_cutoff", *_SHARE), ("top_p", *_SHARE), ("typical_mass", *_SHARE),
    ("temperature", *_TEMPERATURE),
)  # fmt: skip
"""Of every number in `SamplingOptions`: its type, what it must be, and whether it is that."""
_CAN_BE_OFF = ("top_k", "top_p", "typical_mass", "entropy_bound", "guidance")
_CHECKED = (numbers.Number, str, list, tuple, dict, type(None))
"""What is checked; anything else stands for an array."""


@functools.partial(
    jax.tree_util.register_dataclass,
    meta_fields=["steps", "order", "codebook_steps"],
    data_fields=[
        "temperature",
        "mask_temperature",
        "sample_cutoff",
        "top_k",
        "top_p",
        "typical_mass",
        "typical_min_tokens",
        "entropy_bound",
        "guidance",
    ],
)
@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How to decode. The defaults are the original's for its coarse model."""

    steps: int = 36
    """S, decoding steps: more is slower and, up to a point, better."""
    temperature: float = 1.0
    """Divides the logits: below 1 safer, above 1 wilder."""
    mask_temperature: float = 10.5
    """Randomness in the order in which positions are fixed; 0 fixes the surest first."""
    sample_cutoff: float = 1.0
    """Share of the steps that draw tokens at random; after it the likeliest is taken."""
    top_k: int | None = None
    """Draw from the k likeliest tokens only; None switches the filter off."""
    top_p: float | None = None
    """Draw from the likeliest tokens that hold this probability; None switches it off."""
    typical_mass: float | None = 0.15
    """Draw from the tokens of typical surprisal that hold this probability; None: off."""
    typical_min_tokens: int = 64
    """Typical filtering keeps at least this many tokens."""
    order: Literal["confidence", "spread"] = "confidence"
    """Which tokens a step settles. spread: positions chosen before anything is drawn, evenly over
    time, so that only they need drawing; mask_temperature then does nothing."""
    codebook_steps: tuple[int, ...] | None = None
    """Steps of each predicted codebook, one codebook after the other, instead of `steps`."""
    entropy_bound: float | None = None
    """Settle more tokens per step than scheduled, as many of the first in order as have at most so
    many nats of entropy; so it ends before `steps`. The order has the noise of mask_temperature, so
    choose a low one. With order confidence, without codebook_steps."""
    guidance: float | None = None
    """Push the logits away from those of an input of which no predicted token is known, by this
    much. So it acts where some are known: kept ones, or those settled before."""

    def __post_init__(self) -> None:
        for field, sort, form, fits in _FORMS:
            value = getattr(self, field)
            off = value is None and field in _CAN_BE_OFF
            if off or not isinstance(value, _CHECKED):
                continue  # under jit the fields are tracers, which have no values to check
            if isinstance(value, bool) or not isinstance(value, sort) or not fits(value):
                raise InputError(f"{field} is {value!r}; it must be {form}.")
        if self.order not in ("confidence", "spread"):
            raise InputError(f"order is {self.order!r}; it must be confidence or spread.")
        if self.codebook_steps is not None:
            given = self.codebook_steps
            sequence = isinstance(given, list | tuple) and len(given) > 0
            if not sequence or not all(isinstance(n, numbers.Integral) and n >= 1 for n in given):
                raise InputError(
                    f"codebook_steps is {given}; it must be whole numbers of at least 1, one for "
                    "each codebook."
                )
            object.__setattr__(self, "codebook_steps", tuple(given))  # a list cannot be hashed
        if self.entropy_bound is not None and (self.order == "spread" or self.codebook_steps):
            raise InputError(
                "entropy_bound chooses the surest tokens of all codebooks; use it without "
                "codebook_steps and with order confidence."
            )

    def check(self, config: ModelConfig) -> None:
        """Raise InputError if a model of these dimensions cannot be decoded so."""
        steps, predicted = self.codebook_steps, config.n_predicted_codebooks
        if steps is not None and len(steps) != predicted:
            raise InputError(
                f"codebook_steps has {len(steps)} numbers; the model predicts {predicted} "
                "codebooks."
            )

    @property
    def total_steps(self) -> int:
        """Decoding steps, those of all codebooks together; at most, with entropy_bound."""
        return self.steps if self.codebook_steps is None else sum(self.codebook_steps)

    def codebooks_per_step(self, config: ModelConfig) -> int:
        """How many codebooks' logits a step computes."""
        return config.n_predicted_codebooks if self.codebook_steps is None else 1

    def changed(self, **changes: Any) -> "SamplingOptions":
        """A copy with changes.

        `steps` and `entropy_bound` without `codebook_steps` are meant for all codebooks.
        """
        if "steps" in changes or changes.get("entropy_bound") is not None:
            changes = {"codebook_steps": None} | changes
        return dataclasses.replace(self, **changes)


COARSE_DEFAULTS = SamplingOptions()
FINE_DEFAULTS = SamplingOptions(steps=2)


def generate(
    params: model.Params,
    tokens: jax.Array,
    mask: jax.Array,
    key: jax.Array,
    config: ModelConfig,
    options: SamplingOptions,
    *,
    n_frames: jax.Array | int | None = None,
) -> jax.Array:
    """Fill in the masked tokens of the predicted codebooks.

    Each example is decoded on its own: its result depends on its tokens, mask and key, not on
    the batch it is in.

    Args:
      params: as `vampnet_jax.init` returns.
      tokens: int32 `[B, C, T]`; what stands at masked positions does not matter.
      mask: bool `[B, C, T]`, True = generate. Ignored on conditioning codebooks.
      key: one random key, of which example b uses `fold_in(key, b)`, or B keys.
      config: the model's dimensions.
      options: how to decode.
      n_frames: how many of the T frames are music; the rest is padding, which changes nothing: the
        result is that of the first `n_frames` alone. So clips of several lengths can share one
        compiled program. None means all.

    Returns:
      int32 `[B, C, T]`; kept tokens are those of the input.

    Raises:
      ValueError: shapes do not fit each other or the configuration.
      InputError: there are not as many `codebook_steps` as predicted codebooks.
    """
    if tokens.ndim != 3 or tokens.shape[1] != config.n_codebooks:
        raise ValueError(f"tokens are {tokens.shape}; the model needs [B, {config.n_codebooks}, T]")
    if mask.shape != tokens.shape:
        raise ValueError(f"mask is {mask.shape} and tokens are {tokens.shape}; they must be alike")
    options.check(config)
    keys = example_keys(key, tokens.shape[0])
    n_frames = jnp.asarray(tokens.shape[2] if n_frames is None else n_frames, jnp.int32)
    return _generate(params, tokens, mask, keys, n_frames, config, traced(options))


def traced(options: SamplingOptions) -> SamplingOptions:
    """The options as arrays of fixed types, so that 1 and 1.0 share a program."""
    integers = ("top_k", "typical_min_tokens")
    values: dict[str, Any] = {
        field.name: jnp.asarray(value, jnp.int32 if field.name in integers else jnp.float32)
        for field in dataclasses.fields(options)
        if field.name not in ("steps", "order", "codebook_steps")
        and (value := getattr(options, field.name)) is not None
    }
    return dataclasses.replace(options, **values)


def decode(
    params: model.Params,
    tokens: jax.Array,
    mask: jax.Array,
    keys: jax.Array,
    n_frames: jax.Array,
    config: ModelConfig,
    options: SamplingOptions,
    segments: int = SEGMENTS,
) -> jax.Array:
    """`generate` without its checks, not compiled; config and segments are static.

    Args:
      Others as for `generate`; keys are one per example, options arrays but for what is static.
      segments: runs of steps that are compiled on their own, each for no more positions than are
        then masked.
    """
    is_music = jnp.arange(tokens.shape[-1]) < n_frames
    mask = mask.astype(bool) & is_music[None, None]
    given = tokens[:, : config.n_conditioning_codebooks].astype(jnp.int32)
    prompt = jnp.swapaxes(tokens[:, config.n_conditioning_codebooks :], 1, 2).astype(jnp.int32)
    masked = jnp.swapaxes(mask[:, config.n_conditioning_codebooks :], 1, 2)
    bias = model.position_bias(params, tokens.shape[-1], config)
    bias = jnp.where(is_music[None, None], bias, -jnp.inf)  # no frame attends to padding
    by_codebook = options.codebook_steps is not None
    plan = unmasking.plan(options.steps, options.codebook_steps)

    def features(filled: jax.Array, masked: jax.Array) -> jax.Array:
        current = jnp.where(masked, config.mask_token, filled)
        current = jnp.concatenate([given, jnp.swapaxes(current, 1, 2)], axis=1)
        return model.frame_features(params, current, config, bias=bias)

    def part(array: jax.Array, codebook: jax.Array, axis: int = 2) -> jax.Array:
        """What a step works on: one codebook, or all that are predicted."""
        return lax.dynamic_slice_in_dim(array, codebook, 1, axis) if by_codebook else array

    at_first = jnp.sum(masked, axis=1, dtype=jnp.int32)  # by codebook [B, Cp]
    if options.order == "spread":
        offsets = _per_example(jax.random.bits, keys, 2, (config.n_predicted_codebooks,))
        rank = unmasking.spread_ranks(offsets, masked, by_codebook)
    if options.guidance is not None:
        unprompted = features(prompt, jnp.ones_like(masked))

    def step(state: tuple, at: unmasking.Plan, most: int) -> tuple[tuple, None]:
        """One pass of the transformer; `most` tokens are drawn at most."""
        filled, masked = state  # [B, T, Cp]
        here = part(masked, at.codebook)
        n0 = jnp.sum(part(at_first, at.codebook, 1), axis=1)
        still = jnp.sum(here, axis=(1, 2), dtype=jnp.int32)
        count = unmasking.n_still_masked(at.gamma, n0, still)
        elapsed, progress = at.elapsed, at.progress
        if options.entropy_bound is not None:  # there are no known numbers of steps
            share = still / jnp.maximum(n0, 1)
            elapsed = progress = (jnp.arccos(share) * (2 / np.pi))[:, None, None]
        settled = here
        if options.order == "spread":
            settled = here & (part(rank, at.codebook) < (n0 - count)[:, None, None])

        one = at.codebook if by_codebook else None
        logits = model.frame_logits(params, features(filled, masked), config, one)
        if options.guidance is not None:
            prior = model.frame_logits(params, unprompted, config, one)
            logits = logits + options.guidance * (logits - prior)
        step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, at.number)
        u = part(_per_example(jax.random.uniform, step_keys, 0, masked.shape[1:]), at.codebook)
        made = _draw(logits, u, settled, elapsed, most, options)
        filled_here = jnp.where(settled, made.token, part(filled, at.codebook))

        if options.order == "spread":
            still_masked = here & ~settled
        else:
            noise = _per_example(jax.random.gumbel, step_keys, 1, masked.shape[1:])
            noise = options.mask_temperature * (1 - progress) * part(noise, at.codebook)
            confidence = made.log_p + noise
            if options.entropy_bound is not None:
                sure = unmasking.n_within_entropy(
                    confidence, made.entropy, here, options.entropy_bound
                )
                count = jnp.minimum(count, still - sure)
            still_masked = unmasking.least_confident(confidence, here, count)
        if by_codebook:
            put = functools.partial(lax.dynamic_update_slice_in_dim, axis=2)
            filled_here = put(filled, filled_here, at.codebook)
            still_masked = put(masked, still_masked, at.codebook)
        return (filled_here, still_masked), None

    n = masked.shape[1] * (1 if by_codebook else masked.shape[2])
    state = (prompt, masked)
    if options.entropy_bound is not None:
        steps = jax.tree.map(jnp.asarray, plan)

        def go_on(counted: tuple) -> jax.Array:
            return (counted[0] < options.steps) & jnp.any(counted[1][1])

        def next_step(counted: tuple) -> tuple:
            i, state = counted
            return i + 1, step(state, jax.tree.map(lambda x: x[i], steps), n)[0]

        _, state = lax.while_loop(go_on, next_step, (jnp.int32(0), state))
    else:
        for steps, most in _segments(plan, n, options, segments):
            state, _ = lax.scan(functools.partial(step, most=most), state, steps)
    return jnp.concatenate([given, jnp.swapaxes(state[0], 1, 2)], axis=1)


_generate = jax.jit(decode, static_argnames=("config", "segments"))


def _segments(
    plan: unmasking.Plan, n: int, options: SamplingOptions, segments: int
) -> list[tuple[unmasking.Plan, int]]:
    """Runs of steps, and how many of n tokens a step of each draws at most."""
    if options.order == "spread":
        return [(plan, unmasking.most_settled(plan, n))]
    if options.codebook_steps is not None:
        return [(plan, n)]
    most = unmasking.most_masked(plan.gamma, n)
    runs = np.array_split(np.arange(options.steps), min(segments, options.steps))
    return [(jax.tree.map(lambda x, run=run: x[run], plan), int(most[run[0]])) for run in runs]


def _draw(
    logits: jax.Array,
    u: jax.Array,
    wanted: jax.Array,
    elapsed: jax.Array,
    most: int,
    options: SamplingOptions,
) -> Drawn:
    """Tokens for the wanted positions of `[B, T, C]`, of which there are `most` at most."""
    shape, n = wanted.shape, wanted.shape[1] * wanted.shape[2]
    greedy = (elapsed >= options.sample_cutoff).reshape(-1, 1)  # [1 or B, 1]
    logits, u = logits.reshape(len(u), n, -1), u.reshape(-1, n)
    if most < n:  # leave out the others
        first = functools.partial(jnp.nonzero, size=most, fill_value=n)
        rows = jax.vmap(lambda flat: first(flat)[0])(wanted.reshape(-1, n))  # [B, most]
        logits = jnp.take_along_axis(logits, rows[..., None], axis=1, mode="clip")
        u = jnp.take_along_axis(u, rows, axis=1, mode="clip")
    logits = filter_logits(
        logits,
        typical_mass=options.typical_mass,
        typical_min_tokens=options.typical_min_tokens,
        top_k=options.top_k,
        top_p=options.top_p,
    )
    made = draw(logits / options.temperature, u, greedy)
    if most < n:
        put = jax.vmap(lambda row, x: jnp.zeros(n, x.dtype).at[row].set(x, mode="drop"))
        made = jax.tree.map(functools.partial(put, rows), made)
    return jax.tree.map(lambda x: x.reshape(shape), made)


def _per_example(draw, keys: jax.Array, stream: int, shape: tuple[int, ...]) -> jax.Array:
    """Random numbers `[B, *shape]` of which each example's depend on its own key only."""
    return jax.vmap(lambda key: draw(jax.random.fold_in(key, stream), shape))(keys)
