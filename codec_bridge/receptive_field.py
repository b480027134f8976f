"""Which inputs of a chain of 1-D convolutions an output depends on, in integers.

A codec is run over long audio in chunks. A chunk gets exactly the context that the outputs kept
from it depend on, so that they cannot tell where it was cut.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Convolution(NamedTuple):
    """Geometry of one convolution; a transposed one upsamples by `stride`."""

    kernel: int
    stride: int = 1
    dilation: int = 1
    padding: int = 0
    transposed: bool = False

    @property
    def reach(self) -> int:
        """Distance between the first and the last input of one output."""
        return self.dilation * (self.kernel - 1)


def output_length(chain: Sequence[Convolution], length: int) -> int:
    """Number of outputs for `length` inputs, at least 0."""
    for c in chain:
        if length <= 0:
            return 0
        if c.transposed:
            length = (length - 1) * c.stride - 2 * c.padding + c.reach + 1
        else:
            length = (length + 2 * c.padding - c.reach - 1) // c.stride + 1
    return max(length, 0)


def inputs_needed(chain: Sequence[Convolution], start: int, stop: int) -> tuple[int, int]:
    """Half-open range of inputs on which the outputs `start` … `stop - 1` depend.

    It may begin below 0 or end after the last input: there the convolutions see zero padding.
    """
    first, last = start, stop - 1
    for c in reversed(chain):
        if c.transposed:
            # Input i adds to the outputs i·stride − padding … i·stride − padding + reach.
            first = -((c.reach - c.padding - first) // c.stride)
            last = (last + c.padding) // c.stride
        else:
            first = first * c.stride - c.padding
            last = last * c.stride - c.padding + c.reach
    return first, last + 1
