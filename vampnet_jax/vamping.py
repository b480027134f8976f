"""`vamp`: coarse model, then fine model, over token sequences of any length.

A model reads windows of the length it was trained on. Windows overlap, and what an earlier window
has generated is prompt for the next, so that there are no seams.

- Coarse windows run one after the other, from left to right.
- Fine windows depend on the coarse tokens more than on each other: windows that do not overlap
  run as one batch, then those between them, which see generated tokens on both sides.
"""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from vampnet_jax import placement
from vampnet_jax.keys import example_keys
from vampnet_jax.model import Params
from vampnet_jax.sampling import SamplingOptions, generate

if TYPE_CHECKING:
    from vampnet_jax.release import Model, Stage

MAX_ROWS = 16
"""Windows decoded at once on one accelerator; bounds memory."""
CORES_PER_ROW = 2
"""CPU cores that decode one window at once: more windows than that no longer fit their caches."""

Progress = Callable[[str, int, int], None]
"""Called with the stage ("coarse", "fine"), its windows that are done, and how many it has."""


def vamp(
    model: "Model",
    tokens: jax.Array,
    mask: jax.Array,
    key: jax.Array,
    coarse: SamplingOptions | None = None,
    fine: SamplingOptions | None = None,
    *,
    on_progress: Progress | None = None,
) -> jax.Array:
    """Generate the masked tokens of all codebooks (VampNet, section 3).

    Args:
      model: as `vampnet_jax.load` returns.
      tokens: int32 `[B, C, T]`, all codebooks of the fine model, any T.
      mask: bool `[B, C, T]`, True = generate.
      key: one random key, or one per example, as for `generate`.
      coarse, fine: how to decode each stage; None is as the model is best sampled.
      on_progress: called as windows finish.

    Returns:
      int32 `[B, C, T]`; kept tokens are those of the input.

    Raises:
      ValueError: shapes do not fit each other or the model.
    """
    n_codebooks = model.fine.config.n_codebooks
    n_coarse = model.coarse.config.n_codebooks
    if tokens.ndim != 3 or tokens.shape[1] != n_codebooks:
        raise ValueError(f"tokens are {tokens.shape}; the model needs [B, {n_codebooks}, T]")
    if mask.shape != tokens.shape:
        raise ValueError(f"mask is {mask.shape} and tokens are {tokens.shape}; they must be alike")
    coarse = model.coarse_sampling if coarse is None else coarse
    fine = model.fine_sampling if fine is None else fine
    filled, masked = np.array(tokens, np.int32), np.array(mask, bool)
    n_examples, _, n_frames = filled.shape
    if n_examples == 0 or n_frames == 0:
        return jnp.asarray(filled)
    keys = example_keys(key, n_examples)
    coarse_keys, fine_keys = (fold_keys(keys, stage) for stage in (0, 1))

    coarse_passes = [[start] for start in window_starts(n_frames, model.coarse_window)]
    fine_passes = independent(window_starts(n_frames, model.fine_window), model.fine_window)
    fill(
        model.coarse, filled[:, :n_coarse], masked[:, :n_coarse], coarse_keys, coarse,
        coarse_passes, model.coarse_window, _counted("coarse", coarse_passes, on_progress),
    )  # fmt: skip
    masked[:, :n_coarse] = False
    fill(
        model.fine, filled, masked, fine_keys, fine,
        fine_passes, model.fine_window, _counted("fine", fine_passes, on_progress),
    )  # fmt: skip
    return jnp.asarray(filled)


def _counted(
    stage: str, passes: list[list[int]], on_progress: Progress | None
) -> Callable[[int], None]:
    """From windows just done, as `fill` reports them, to windows done so far."""
    done, total = 0, sum(map(len, passes))

    def report(count: int) -> None:
        nonlocal done
        done += count
        if on_progress is not None:
            on_progress(stage, done, total)

    return report


def window_starts(n_frames: int, window: int) -> list[int]:
    """First frames of windows that cover `n_frames`, each sharing a quarter or more with the next.

    The last window ends with the last frame. A sequence that fits one window has one.
    """
    if n_frames <= window:
        return [0]
    stride = max(1, window - window // 4)
    return [*range(0, n_frames - window, stride), n_frames - window]


def bucket(length: int, window: int) -> int:
    """Frames that a sequence of at most a window is padded to: the next eighth of the window.

    So clips of any length need eight programs at most.
    """
    eighths = -(-8 * length // window)
    return -(-eighths * window // 8)


def independent(starts: list[int], window: int) -> list[list[int]]:
    """Windows in passes within which none overlap; every other window goes to the first pass."""
    passes: list[list[int]] = []
    for start in starts:
        for members in passes:
            if start >= members[-1] + window:
                members.append(start)
                break
        else:
            passes.append([start])
    return passes


def rows_at_once(params: Params) -> int:
    """Windows that are decoded as one batch, at most, where these parameters lie.

    Batches help accelerators. On two CPU cores they take longer than their windows one by one
    (`benchmarks/one_by_one.py`).
    """
    (device, *_) = jnp.asarray(jax.tree.leaves(params)[0]).devices()
    shards = placement.batch_shards(params)
    if device.platform != "cpu":
        return MAX_ROWS * shards
    rows = min(MAX_ROWS, max(1, _cores() // CORES_PER_ROW))
    return max(shards, _next_power_of_two(rows + 1) // 2)  # the last power at or below


def _cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def fill(
    stage: "Stage",
    tokens: np.ndarray,
    mask: np.ndarray,
    keys: jax.Array,
    options: SamplingOptions,
    passes: list[list[int]],
    window: int,
    report: Callable[[int], None],
) -> None:
    """Generate in place, pass by pass; whatever is generated is prompt from then on."""
    mask = mask.copy()
    n_examples = len(tokens)
    for starts in passes:
        rows = [(example, start) for start in starts for example in range(n_examples)]
        at_once = rows_at_once(stage.params)
        for first in range(0, len(rows), at_once):
            group = rows[first : first + at_once]
            # Of several windows, a few batch sizes mean a few programs for pieces of any length.
            size = len(group) if len(starts) == 1 else _next_power_of_two(len(group))
            _fill_group(stage, tokens, mask, keys, options, group, size, window)
            report((first + len(group)) // n_examples - first // n_examples)


def _fill_group(
    stage: "Stage",
    tokens: np.ndarray,
    mask: np.ndarray,
    keys: jax.Array,
    options: SamplingOptions,
    group: list[tuple[int, int]],
    size: int,
    window: int,
) -> None:
    """Decode some (example, first frame) windows as one batch of `size` rows."""
    spans = [(example, slice(start, start + window)) for example, start in group]
    if any(mask[example, :, span].any() for example, span in spans):
        size += -size % placement.batch_shards(stage.params)  # each device gets as many
        padded = group + group[-1:] * (size - len(group))
        padded_spans = [(example, slice(start, start + window)) for example, start in padded]
        examples, starts = (np.array(column) for column in zip(*padded, strict=True))
        length = min(window, tokens.shape[-1])
        padding = ((0, 0), (0, 0), (0, bucket(length, window) - length))

        def rows(array: np.ndarray) -> jax.Array:
            stacked = np.stack([array[example, :, span] for example, span in padded_spans])
            return placement.beside(stage.params, jnp.asarray(np.pad(stacked, padding)))

        made = generate(
            stage.params,
            rows(tokens),
            rows(mask),
            placement.beside(stage.params, jax.vmap(jax.random.fold_in)(keys[examples], starts)),
            stage.config,
            options,
            n_frames=length,
        )
        for row, (example, span) in zip(np.asarray(made), spans, strict=False):
            tokens[example, :, span] = row[:, :length]
    for example, span in spans:
        mask[example, :, span] = False


def fold_keys(keys: jax.Array, data: int) -> jax.Array:
    """`fold_in` of the same data into B keys."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, data)


def _next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
