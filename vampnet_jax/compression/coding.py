"""The order in which a file's tokens are coded, and the frequencies that each is coded under.

Encoder and decoder take the same walk: what they know at any point is what was coded before.
"""

import itertools
from collections.abc import Iterator

import numpy as np

from vampnet_jax.compression.prediction import LEAST_BITS, Predictor, scramble
from vampnet_jax.compression.range_coding import Coder
from vampnet_jax.vamping import window_starts

PASSES = 12
"""Times that the model looks at a window; each time it knows more of it."""
_SHARES = 256
"""Steps in which a codebook's share of kept tokens is told; its mask is coded under that alone."""


def grid(n_codebooks: int, n_frames: int, period: int) -> np.ndarray:
    """Keep every `period`-th frame: bool `[n_codebooks, T]`, True = keep."""
    # In numpy: JAX would compile a program for every length that a file may claim.
    frames = np.zeros(n_frames, bool)
    frames[::period] = True
    return np.broadcast_to(frames, (n_codebooks, n_frames))


def code_mask(coder: Coder, keep: np.ndarray) -> np.ndarray:
    """Code which tokens are kept, bool `[codebooks, T]`: a share per codebook, then its bits."""
    made = np.zeros(keep.shape, bool)
    for bits, row in zip(keep, made, strict=True):
        share = np.clip(np.rint(_SHARES * bits.mean()), 1, _SHARES - 1).astype(int)
        share = int(coder.code(np.array([share - 1]), np.ones(_SHARES - 1, np.int32))[0]) + 1
        row[:] = coder.code(bits, np.array([_SHARES - share, share], np.int32))
    return made


def code_tokens(
    coder: Coder,
    tokens: np.ndarray,
    keep: np.ndarray,
    table: np.ndarray,
    predictor: Predictor | None = None,
) -> np.ndarray:
    """Code the kept tokens.

    Args:
      coder: one end of the line.
      tokens: int32 `[channels, codebooks, T]`; a decoder looks at the shape only.
      keep: bool `[codebooks, T]`, the same in all channels.
      table: int32 `[codebooks, V]`, frequencies of each codebook's tokens.
      predictor: codes under the model's probabilities what `predicted_codebooks` says.

    Returns:
      int32 `[channels, codebooks, T]`, 0 where not kept.
    """
    made = np.zeros(tokens.shape, np.int32)
    n_predicted = 0
    if predictor is not None:
        n_predicted = predicted_codebooks(predictor, keep)
        for source, target in zip(tokens, made, strict=True):
            _code_with_model(coder, source, target, keep[:n_predicted], predictor)
    for codebook in range(n_predicted, len(keep)):
        chosen = np.flatnonzero(keep[codebook])
        values = coder.code(tokens[:, codebook, chosen].reshape(-1), table[codebook])
        made[:, codebook, chosen] = values.reshape(len(tokens), len(chosen))
    return made


def least_bits(
    channels: int, keep: np.ndarray, table: np.ndarray, predictor: Predictor | None = None
) -> float:
    """What the kept tokens cost at least, whichever they are; arguments as for `code_tokens`."""
    n_predicted = 0 if predictor is None else predicted_codebooks(predictor, keep)
    likeliest = np.log2(table.sum(axis=1) / table.max(axis=1))
    likeliest[:n_predicted] = LEAST_BITS
    return channels * float(keep.sum(axis=1) @ likeliest)


def predicted_codebooks(predictor: Predictor, keep: np.ndarray) -> int:
    """How many codebooks are coded under the model's probabilities.

    The coarse model was trained with gaps, the fine model with whole coarse codebooks only. So the
    fine model is asked only where all coarse tokens are kept.
    """
    n_coarse = predictor.coarse.config.n_codebooks
    whole = len(keep) > n_coarse and bool(keep[:n_coarse].all())
    return len(keep) if whole else min(len(keep), n_coarse)


def arithmetic(predictor: Predictor | None, keep: np.ndarray) -> bytes:
    """4 bytes that differ where the model's probabilities would; zeros without a model."""
    if predictor is None:
        return bytes(4)
    n_frames = keep.shape[1]
    digest = predictor.fingerprint(predictor.coarse, min(n_frames, predictor.coarse_window))
    if predicted_codebooks(predictor, keep) > predictor.coarse.config.n_codebooks:
        fine = predictor.fingerprint(predictor.fine, min(n_frames, predictor.fine_window))
        digest = bytes(a ^ b for a, b in zip(digest, fine, strict=True))
    return digest


def _code_with_model(
    coder: Coder, source: np.ndarray, target: np.ndarray, keep: np.ndarray, predictor: Predictor
) -> None:
    """One channel `[codebooks, T]`: coarse windows from left to right, then fine ones."""
    n_coarse = predictor.coarse.config.n_codebooks
    for stage, window, first in (
        (predictor.coarse, predictor.coarse_window, 0),
        (predictor.fine, predictor.fine_window, n_coarse),
    ):
        wanted = keep[first : stage.config.n_codebooks]
        if not wanted.any():
            continue
        known = np.full((stage.config.n_codebooks, keep.shape[1]), stage.config.mask_token)
        known[:first] = target[:first]
        missing = np.zeros(known.shape, bool)
        missing[first : first + len(wanted)] = wanted
        for start in window_starts(keep.shape[1], window):
            span = slice(start, start + window)
            for rows, columns in _passes(missing[:, span]):
                counts = predictor.frequencies(stage, known[:, span])
                counts = counts[rows - first, columns]
                values = coder.code(source[rows, start + columns], counts)
                target[rows, start + columns] = known[rows, start + columns] = values
            missing[:, span] = False


def _passes(missing: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Divide the missing tokens of a window `[C, T]` into passes, the first ones being small.

    What is scattered is easier to guess from than what is next to each other, so the order is
    pseudo-random; codebooks and frames of a pass come as two index arrays.
    """
    positions = np.flatnonzero(missing)
    order = positions[np.argsort(scramble(positions), kind="stable")]
    borders = [len(order) * i**2 // PASSES**2 for i in range(PASSES + 1)]
    for start, stop in itertools.pairwise(borders):
        if stop > start:
            rows, columns = np.unravel_index(order[start:stop], missing.shape)
            yield rows, columns
