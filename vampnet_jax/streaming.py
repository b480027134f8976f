"""`stream`: `vamp` that hands out audio while the rest of a piece is still being made.

The tokens are those that `vamp` makes. A fine window is made as soon as what it reads is final:
its coarse tokens, and the windows before it in the order of `vamp` that it overlaps. That changes
when a window is made but not what it sees, and its random numbers come from its first frame.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

from codec_bridge.codec import Codec
from vampnet_jax.keys import example_keys
from vampnet_jax.sampling import SamplingOptions
from vampnet_jax.vamping import fill, fold_keys, independent, window_starts

if TYPE_CHECKING:
    from vampnet_jax.release import Model


class Piece(NamedTuple):
    """Some consecutive frames of the result."""

    start: int
    """The first frame."""
    tokens: np.ndarray
    """int32 `[B, C, n]`."""
    audio: np.ndarray
    """float32 `[B, n · hop]`."""


def stream(
    model: "Model",
    tokens_or_audio: jax.Array | np.ndarray,
    mask: jax.Array | np.ndarray,
    key: jax.Array,
    coarse: SamplingOptions | None = None,
    fine: SamplingOptions | None = None,
) -> Iterator[Piece]:
    """Vamp, and yield the audio piece by piece from the beginning as it gets ready.

    The pieces joined are `model.codec.decode(vamp(model, tokens, mask, key, coarse, fine))`, the
    tokens equal (up to what another batch size does to rounding) and the audio to 1e-5. The first
    piece takes one coarse window, one fine window and the decoding of it; audio is encoded as far
    as that needs it, too. Nothing is computed ahead of what is asked for.

    Args:
      model: as `vampnet_jax.load` returns.
      tokens_or_audio: int32 `[B, C, T]` as `vamp` takes them, or float `[B, samples]` at the
        codec's rate.
      mask: bool `[B, C, T]`, True = generate. Of audio, T = ⌈samples / hop⌉.
      key, coarse, fine: as for `vamp`.

    Yields:
      Consecutive pieces, at least one frame each; together T frames.

    Raises:
      ValueError: shapes do not fit each other or the model. Raised by the call, not by the first
        piece.
      InputError: audio with samples that are not finite.
    """
    codec, n_codebooks = model.codec, model.fine.config.n_codebooks
    given, masked = np.asarray(tokens_or_audio), np.array(mask, bool)
    is_audio = np.issubdtype(given.dtype, np.floating)
    if is_audio and given.ndim == 2:
        want: tuple[int, ...] = (len(given), n_codebooks, codec.n_frames(given.shape[1]))
    elif not is_audio and given.ndim == 3 and given.shape[1] == n_codebooks:
        want = given.shape
    else:
        raise ValueError(
            f"the input is {given.dtype} {given.shape}; give integer tokens [B, {n_codebooks}, T] "
            "or floating-point audio [B, samples]"
        )
    if masked.shape != want:
        raise ValueError(f"mask is {masked.shape}; the input needs {want}")
    if 0 in want:
        return iter(())
    source = _encoded_tokens(codec, given, n_codebooks) if is_audio else _given_tokens(given)
    coarse = model.coarse_sampling if coarse is None else coarse
    fine = model.fine_sampling if fine is None else fine
    return _pieces(model, source, masked, key, coarse, fine)


Source = Callable[[int, int], np.ndarray]
"""The tokens `[B, C, stop − start]` of frames `start` … `stop − 1`."""


def _given_tokens(tokens: np.ndarray) -> Source:
    return lambda start, stop: tokens[..., start:stop]


def _encoded_tokens(codec: Codec, audio: np.ndarray, n_codebooks: int) -> Source:
    def source(start: int, stop: int) -> np.ndarray:
        before, after = codec.encoder_context
        first, hop = max(0, start - before), codec.hop_length
        tokens = np.asarray(codec.encode(audio[:, first * hop : (stop + after) * hop]))
        return tokens[:, :n_codebooks, start - first : stop - first]

    return source


def _pieces(
    model: "Model",
    source: Source,
    masked: np.ndarray,
    key: jax.Array,
    coarse: SamplingOptions,
    fine: SamplingOptions,
) -> Iterator[Piece]:
    n_examples, _, n_frames = masked.shape
    n_coarse = model.coarse.config.n_codebooks
    coarse_keys, fine_keys = (fold_keys(example_keys(key, n_examples), stage) for stage in (0, 1))
    coarse_window, fine_window = model.coarse_window, model.fine_window
    passes = independent(window_starts(n_frames, fine_window), fine_window)
    waiting = [list(starts) for starts in passes]
    final = np.zeros(n_frames, bool)
    filled = np.zeros(masked.shape, np.int32)
    known = sent = 0
    for start in window_starts(n_frames, coarse_window):
        stop = min(start + coarse_window, n_frames)
        filled[..., known:stop] = source(known, stop)
        known = stop
        fill(
            model.coarse, filled[:, :n_coarse], masked[:, :n_coarse], coarse_keys, coarse,
            [[start]], coarse_window, _ignore,
        )  # fmt: skip
        masked[:, :n_coarse, start:stop] = False
        for order, starts in enumerate(waiting):
            before = [s for earlier in waiting[:order] for s in earlier]
            ready = [
                s
                for s in starts
                if min(s + fine_window, n_frames) <= known
                and all(abs(s - other) >= fine_window for other in before)
            ]
            if not ready:
                continue
            fill(
                model.fine, filled, masked, fine_keys, fine, [ready], fine_window, _ignore
            )  # fmt: skip
            for s in ready:
                masked[..., s : s + fine_window] = False
                final[s : s + fine_window] = True
                starts.remove(s)
        n_final = n_frames if final.all() else int(final.argmin())
        before_piece, after_piece = model.codec.decoder_context
        ready_to_send = n_final if n_final == n_frames else n_final - after_piece
        if ready_to_send > sent:
            first, hop = max(0, sent - before_piece), model.codec.hop_length
            sound = np.asarray(model.codec.decode(filled[..., first:n_final]))
            yield Piece(
                sent,
                filled[..., sent:ready_to_send].copy(),
                sound[:, (sent - first) * hop : (ready_to_send - first) * hop],
            )
            sent = ready_to_send


def _ignore(count: int) -> None:
    """Progress is seen by the pieces themselves."""
