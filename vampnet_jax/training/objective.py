"""What is learnt: to name masked tokens (VampNet, section 3.2 and MaskGIT, section 3.1)."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from vampnet_jax.config import ModelConfig
from vampnet_jax.model import Params, frame_features, frame_logits, position_bias_by_part

TOP_K = 25
LOGIT_BYTES = 2**27
"""Logits that a device holds at once while the loss is computed; more are computed in parts."""
GOLDEN = 2654435769
"""2³² divided by the golden ratio, odd: its multiples mod 2³² are a low-discrepancy sequence."""

LONGEST_PERIOD = 16
"""Frames; the longest period of `draw_gaps`."""
WIDEST_KEPT = 4
"""Frames; how many of a period `draw_gaps` keeps at most."""

RATIO_BINS = {
    "r<0.5": (0.0, 0.5),
    "r>=0.5": (0.5, 1.0),
    "r0-0.25": (0.0, 0.25),
    "r0.25-0.5": (0.25, 0.5),
    "r0.5-0.75": (0.5, 0.75),
    "r0.75-1": (0.75, 1.0),
}
"""Ranges [from, to) of mask ratios that are reported apart: VampNet's halves, and quarters."""


class Sums(NamedTuple):
    """Sums over the masked tokens of each example, float32 `[B]` each."""

    tokens: jax.Array
    """How many tokens were masked."""
    loss: jax.Array
    """Cross-entropy against the smoothed label, nats."""
    log_loss: jax.Array
    """Cross-entropy against the token itself, nats."""
    top_1: jax.Array
    """How often the token had the highest logit."""
    top_k: jax.Array
    """How often the token was among the 25 highest."""


def mask_ratios(seed: jax.Array, examples: jax.Array) -> jax.Array:
    """Mask ratios r ∈ [0, 1) of examples by their number in the run: `[B]` uint32 → float32.

    Every stretch of examples covers [0, 1) evenly (a Kronecker sequence of the golden ratio,
    in integers, so that it stays exact for any length of run). The seed shifts the sequence.
    """
    position = examples.astype(jnp.uint32) * jnp.uint32(GOLDEN) + seed.astype(jnp.uint32)
    return (position >> 8).astype(jnp.float32) * 2.0**-24  # 24 bits are exact in float32


def draw_masks(keys: jax.Array, ratios: jax.Array, n_frames: int, config: ModelConfig) -> jax.Array:
    """Mask every predicted token independently with probability cos(π r / 2).

    Args:
      keys: one random key per example, `[B]`; an example's mask does not depend on the others.
      ratios: r of each example, `[B]`.
      n_frames: T.
      config: decides C and which codebooks are conditioning; those are never masked.

    Returns:
      bool `[B, C, T]`, True = masked.
    """
    shape = (config.n_predicted_codebooks, n_frames)
    draws = jax.vmap(lambda key: jax.random.uniform(key, shape))(keys)
    masked = draws < jnp.cos(ratios * (jnp.pi / 2))[:, None, None]
    given = ((0, 0), (config.n_conditioning_codebooks, 0), (0, 0))
    return jnp.pad(masked, given)


def draw_level_masks(
    keys: jax.Array, ratios: jax.Array, n_frames: int, config: ModelConfig, examples: jax.Array
) -> jax.Array:
    """Mask as when codebooks are filled in one after the other (SoundStorm, section 3.2).

    Every example has a level, a predicted codebook: those before it are known, those after it
    masked, and its own tokens masked with probability cos(π r / 2). Levels take turns.

    Args:
      keys, ratios, n_frames, config: as for `draw_masks`.
      examples: number of each example in the run, uint32 `[B]`.

    Returns:
      bool `[B, C, T]`, True = masked.
    """
    turn = (examples % jnp.uint32(config.n_predicted_codebooks)).astype(jnp.int32)
    level = (config.n_conditioning_codebooks + turn)[:, None, None]
    codebooks = jnp.arange(config.n_codebooks)[None, :, None]
    own = draw_masks(keys, ratios, n_frames, config) & (codebooks == level)
    return own | (codebooks > level)


def draw_gaps(keys: jax.Array, n_frames: int) -> jax.Array:
    """The frames that a periodic prompt leaves to the model, one prompt per example.

    A prompt has a period of 2 to `LONGEST_PERIOD` frames, and at the start of each, after a random
    offset, 1 to `WIDEST_KEPT` frames that are kept.

    Args:
      keys: one random key per example, `[B]`; an example's gaps do not depend on the others.
      n_frames: T.

    Returns:
      bool `[B, T]`, True = in a gap; in very short excerpts there may be none.
    """

    def in_gap(key: jax.Array) -> jax.Array:
        period_key, width_key, offset_key = jax.random.split(key, 3)
        period = jax.random.randint(period_key, (), 2, LONGEST_PERIOD + 1)
        width = jax.random.randint(width_key, (), 1, jnp.minimum(period, WIDEST_KEPT + 1))
        offset = jax.random.randint(offset_key, (), 0, period)
        return (jnp.arange(n_frames) + offset) % period >= width

    return jax.vmap(in_gap)(keys)


def masked_sums(
    params: Params,
    tokens: jax.Array,
    mask: jax.Array,
    config: ModelConfig,
    *,
    label_smoothing: float = 0.0,
    dropout_key: jax.Array | None = None,
    place: Callable[[jax.Array], jax.Array] = lambda x: x,
    shards: int = 1,
    logit_bytes: int = LOGIT_BYTES,
) -> Sums:
    """Predict the masked tokens and sum losses and hits over them.

    Logits of a large batch are never held at once: the head and the loss go over some frames at a
    time, and compute their logits again for the gradient.

    Args:
      params: as `vampnet_jax.init` returns.
      tokens: int32 `[B, C, T]`, the truth.
      mask: bool `[B, C, T]`, True = hidden from the model and scored.
      config: the model's dimensions.
      label_smoothing: share ε of the target spread evenly over the V codes.
      dropout_key: switches dropout on; one key, or one per example.
      place: says where activations lie; gets arrays `[B, …]`.
      shards: how many devices divide the batch.
      logit_bytes: how much of the float32 logits a device may hold at once.
    """
    hidden = jnp.where(mask, config.mask_token, tokens)
    bias = None
    if shards > 1 and config.attention == "xla":
        bias = position_bias_by_part(params, tokens.shape[-1], shards, place)
    x = frame_features(
        params, hidden, config, bias=bias, dropout_key=dropout_key, place=place
    )  # [B, T, D]
    given = config.n_conditioning_codebooks
    target = jnp.swapaxes(tokens[:, given:], 1, 2)  # [B, T, Cp]
    scored = jnp.swapaxes(mask[:, given:], 1, 2)

    def sums_of(frames: tuple[jax.Array, jax.Array, jax.Array]) -> Sums:
        x, target, scored = frames
        logits = frame_logits(params, place(x), config)
        return _sums(logits, target, scored.astype(jnp.float32), label_smoothing)

    batch, n_frames, n_predicted = target.shape
    size = 4 * batch * n_frames * n_predicted * config.vocab_size / shards
    parts = min(n_frames, math.ceil(size / logit_bytes))
    if parts == 1:
        return sums_of((x, target, scored))
    length = math.ceil(n_frames / parts)
    parts = math.ceil(n_frames / length)

    def divided(array: jax.Array) -> jax.Array:  # [B, T, …] → [parts, B, length, …]
        tail = [(0, 0)] * (array.ndim - 2)
        array = jnp.pad(array, [(0, 0), (0, parts * length - n_frames), *tail])
        array = array.reshape(batch, parts, length, *array.shape[2:])
        return jnp.moveaxis(array, 1, 0)

    sums_of = jax.checkpoint(sums_of, prevent_cse=False)
    frames = jax.tree.map(divided, (x, target, scored))
    by_part = lax.scan(lambda _, frames: (None, sums_of(frames)), None, frames)[1]
    return Sums(*(jnp.sum(values, axis=0) for values in by_part))


def _sums(logits: jax.Array, target: jax.Array, scored: jax.Array, label_smoothing: float) -> Sums:
    """Of logits `[B, T, Cp, V]`, target and scored `[B, T, Cp]`."""
    # −log softmax by the log-sum-exp: no second array as large as the logits is kept. The target's
    # logit is found by comparing, which divides over devices where a lookup does not.
    log_total = jax.nn.logsumexp(logits, axis=-1)
    codes = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    truth = jnp.sum(jnp.where(codes == target[..., None], logits, 0.0), axis=-1)
    log_loss = log_total - truth
    loss = log_loss
    if label_smoothing:
        spread = log_total - jnp.mean(logits, axis=-1)
        loss = (1 - label_smoothing) * log_loss + label_smoothing * spread
    higher = jnp.sum(lax.stop_gradient(logits) > lax.stop_gradient(truth)[..., None], axis=-1)

    def total(values: jax.Array) -> jax.Array:
        return jnp.sum(values.astype(jnp.float32) * scored, axis=(1, 2))

    return Sums(
        tokens=jnp.sum(scored, axis=(1, 2)),
        loss=total(loss),
        log_loss=total(log_loss),
        top_1=total(higher < 1),
        top_k=total(higher < TOP_K),
    )


def metrics_by_ratio(sums: Sums, ratios: jax.Array) -> dict[str, jax.Array]:
    """Mean losses over masked tokens, and loss and accuracies of every bin of mask ratios.

    The loss of a batch without masked tokens is 0; an accuracy or loss of an empty bin is NaN.
    """
    n_tokens = jnp.maximum(jnp.sum(sums.tokens), 1.0)
    metrics = {
        "loss": jnp.sum(sums.loss) / n_tokens,
        "log_loss": jnp.sum(sums.log_loss) / n_tokens,
    }
    for name, (low, high) in RATIO_BINS.items():
        chosen = ((ratios >= low) & (ratios < high)).astype(jnp.float32)
        count = jnp.sum(sums.tokens * chosen)
        metrics[f"log_loss_at/{name}"] = jnp.sum(sums.log_loss * chosen) / count
        metrics[f"top1/{name}"] = jnp.sum(sums.top_1 * chosen) / count
        metrics[f"top25/{name}"] = jnp.sum(sums.top_k * chosen) / count
    return metrics
