"""Symbols to bytes and back under integer frequencies, by `constriction`'s range coder.

`Encoder` and `Decoder` have one method in common, `code`, so that one walk over the tokens serves
both ends: the encoder writes the values that it is given, the decoder returns those that it reads.
"""

from typing import Protocol

import constriction
import numpy as np

from codec_bridge.errors import InputError

_SLACK_BITS = 128
"""What the coder may save at the end of a message."""


class Coder(Protocol):
    """One end of the line."""

    def code(self, values: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
        """Code some symbols.

        Args:
          values: integers `[n]`; a decoder looks at their number only.
          frequencies: integers of at least 1, `[V]` for all symbols or `[n, V]`; their sum is at
            most 2²³, exact in float32 and within the coder's 24 bits.

        Returns:
          int32 `[n]`: the values.
        """


class Encoder:
    """Collects symbols; `payload` returns the bytes."""

    def __init__(self) -> None:
        self._encoder = constriction.stream.queue.RangeEncoder()

    def code(self, values: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
        symbols = np.ascontiguousarray(values, np.int32)
        if symbols.size:
            self._encoder.encode(symbols, *_model(frequencies))
        return symbols

    def payload(self) -> bytes:
        """What was coded; zero bytes at the end of the last word are left out."""
        words = self._encoder.get_compressed().astype(">u4").tobytes()
        return words[:-4] + words[-4:].rstrip(b"\0")


class Decoder:
    """Reads symbols; never more than the payload can hold, so a lying length costs nothing."""

    def __init__(self, payload: bytes) -> None:
        padded = payload + bytes(-len(payload) % 4)
        self._decoder = constriction.stream.queue.RangeDecoder(
            np.frombuffer(padded, ">u4").astype(np.uint32)
        )
        self._bits_left = 8.0 * len(payload) + _SLACK_BITS

    def code(self, values: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
        n = len(values)
        if n == 0:
            return np.zeros(0, np.int32)
        self.claim(n, frequencies)
        try:
            return self._decoder.decode(
                *_model(frequencies), *([n] if frequencies.ndim == 1 else [])
            )
        except (AssertionError, ValueError) as error:
            raise InputError("it is damaged: its payload cannot be decoded.") from error

    def claim(self, n: int, frequencies: np.ndarray) -> None:
        """Take off what n symbols cost at least, however likely they are."""
        likeliest = frequencies.max(axis=-1) / frequencies.sum(axis=-1)
        bits = float(-np.log2(likeliest).sum()) * (1 if frequencies.ndim > 1 else n)
        self.expect(bits)
        self._bits_left -= bits

    def expect(self, bits: float) -> None:
        """Raise InputError if so much cannot be in what is left."""
        if bits > self._bits_left:
            raise InputError("it says that it has more tokens than its size can hold.")


def information(values: np.ndarray, frequencies: np.ndarray) -> float:
    """-sum log2 p, in bits: what the values cost at least; arguments as for `Coder.code`."""
    if frequencies.ndim > 1:
        chosen = np.take_along_axis(frequencies, np.asarray(values)[:, None], axis=1)[:, 0]
    else:
        chosen = frequencies[values]
    total = frequencies.sum(axis=-1)
    return float((np.log2(total) - np.log2(chosen)).sum()) if len(values) else 0.0


def _model(frequencies: np.ndarray) -> tuple:
    """The arguments that `constriction` wants for fixed or for changing frequencies."""
    categorical = constriction.stream.model.Categorical
    weights = np.ascontiguousarray(frequencies, np.float32)
    if frequencies.ndim == 1:
        return (categorical(weights, perfect=False),)
    return categorical(perfect=False), weights
