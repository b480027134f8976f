"""The codec's activation, x + sin²(αx)/α, compiled.

torch.compile turns its passes over memory into one each way, in float32 whatever the type of x.
It needs a C++ compiler and Python's headers (Debian: g++, python3-dev); without, the codec's own
is left in place.
"""

import functools
import sys
import warnings

import torch


@torch.compile(dynamic=True)
def activate(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """[B, C, T] of [B, C, T] and alpha [1, C, 1]."""
    wide = x.float()
    sine = torch.sin(alpha * wide)
    return (wide + sine * sine / (alpha + 1e-9)).to(x.dtype)


@torch.compile(dynamic=True)
def gradients(
    x: torch.Tensor, alpha: torch.Tensor, gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of x [B, C, T] and of alpha [1, C, 1]."""
    wide, upstream = x.float(), gradient.float()
    sine, cosine = torch.sin(alpha * wide), torch.cos(alpha * wide)
    slope = 2 * sine * cosine
    by_alpha = upstream * (slope * wide - sine * sine / (alpha + 1e-9)) / (alpha + 1e-9)
    return (upstream * (1 + slope)).to(x.dtype), by_alpha.sum((0, 2), keepdim=True)


class Snake(torch.autograd.Function):
    """Keeps nothing but its input for the way back."""

    @staticmethod
    def forward(ctx, x, alpha):
        ctx.save_for_backward(x, alpha)
        return activate(x, alpha.detach())  # of parameters each size would be compiled by itself

    @staticmethod
    def backward(ctx, gradient):
        x, alpha = ctx.saved_tensors
        return gradients(x, alpha.detach(), gradient)


@functools.cache
def compiles() -> bool:
    """Whether torch.compile finds what it needs to compile these here."""
    try:
        gradients(torch.zeros(2, 2, 3), torch.ones(1, 2, 1), torch.zeros(2, 2, 3))
    except Exception as error:  # whatever a missing compiler or header leads to
        warnings.warn(f"activations are not compiled, training is slower: {error}", stacklevel=2)
        return False
    return True


def use_in_dac() -> None:
    """Let descript-audio-codec, once imported, compute its activations here, where possible."""
    if compiles():
        layers = sys.modules["dac.nn.layers"]
        layers.Snake1d.forward = lambda self, x: Snake.apply(x, self.alpha)
