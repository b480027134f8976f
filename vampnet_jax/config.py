"""The dimensions of a model, and how it computes."""

import dataclasses
from typing import Literal, get_args

from codec_bridge.errors import InputError

Remat = Literal["none", "attention", "dots", "full"]
Dtype = Literal["float32", "bfloat16", "bfloat16-products"]


MAX_SIZE = 2**20
"""Of any dimension; far above all in use, so that a damaged file cannot ask for the absurd."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that decides a model's parameters and its program; hashable, so static under jit.

    The coarse and the fine model of VampNet are the same network; a fine model has
    conditioning codebooks.
    """

    n_codebooks: int
    """C, codebooks that the model reads."""
    n_conditioning_codebooks: int = 0
    """Cc, the first codebooks, which are given and never predicted."""
    n_layers: int = 20
    """L, transformer blocks."""
    n_heads: int = 20
    """H, attention heads; divides the width."""
    embedding_dim: int = 1280
    """D, the transformer's width."""
    vocab_size: int = 1024
    """V, codes per codebook; token id V is MASK."""
    latent_dim: int = 8
    """d, width of one codebook vector."""
    dropout: float = 0.1
    """Share of activations dropped in training (when a dropout key is given)."""
    remat: Remat = "none"
    """What the backward pass computes again instead of keeping it: less memory, more time.
    `none`; `attention`: what is as large as frames × frames; `dots`: all but the blocks' products
    with weights; `full`: all of each block. A bool, as older files have it, is none or full."""
    dtype: Dtype = "float32"
    """What matrix products compute in; norms, softmax and logits are float32 always. With bfloat16
    all other activations are, too; with `bfloat16-products`, for CPUs, only what is multiplied with
    the blocks' and the head's weights is rounded to it, and the rest is float32."""
    attention: Literal["xla", "cudnn"] = "xla"
    """Attention kernel; cudnn needs an NVIDIA GPU and bfloat16."""

    def __post_init__(self) -> None:
        positive = (
            "n_codebooks",
            "n_layers",
            "n_heads",
            "embedding_dim",
            "vocab_size",
            "latent_dim",
        )
        for name in (*positive, "n_conditioning_codebooks"):
            value = getattr(self, name)
            if type(value) is not int or value < (name in positive):
                raise InputError(
                    f"{name} is {value!r}; it must be a whole number of at least "
                    f"{int(name in positive)}."
                )
            if value > MAX_SIZE:
                raise InputError(f"{name} is {value}; it must be at most {MAX_SIZE}.")
        if self.n_conditioning_codebooks >= self.n_codebooks:
            raise InputError(
                f"n_conditioning_codebooks is {self.n_conditioning_codebooks}; it must be from 0 "
                f"to n_codebooks - 1 = {self.n_codebooks - 1}."
            )
        if self.embedding_dim % self.n_heads:
            raise InputError(
                f"embedding_dim {self.embedding_dim} is not a multiple of n_heads {self.n_heads}."
            )
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise InputError(f"dropout is {self.dropout!r}; it must be from 0 to below 1.")
        if isinstance(self.remat, bool):
            object.__setattr__(self, "remat", "full" if self.remat else "none")
        if self.remat not in get_args(Remat):
            raise InputError(
                f"remat is {self.remat!r}; choose one of {', '.join(get_args(Remat))}."
            )
        if self.dtype not in get_args(Dtype):
            raise InputError(
                f"dtype is {self.dtype!r}; choose one of {', '.join(get_args(Dtype))}."
            )
        if self.attention not in ("xla", "cudnn"):
            raise InputError(f"attention is {self.attention!r}; choose xla or cudnn.")
        if self.attention == "cudnn" and self.dtype != "bfloat16":
            raise InputError("cuDNN attention computes in 16 bits; set dtype to bfloat16 with it.")

    @property
    def activation_dtype(self) -> str:
        """What lies between the blocks."""
        return "bfloat16" if self.dtype == "bfloat16" else "float32"

    @property
    def product_dtype(self) -> str:
        """What is multiplied with the blocks' and the head's weights."""
        return "float32" if self.dtype == "float32" else "bfloat16"

    @property
    def mask_token(self) -> int:
        """The id of MASK: one past the last code."""
        return self.vocab_size

    @property
    def n_predicted_codebooks(self) -> int:
        """Cp = C - Cc."""
        return self.n_codebooks - self.n_conditioning_codebooks

    @property
    def head_dim(self) -> int:
        """K = D / H."""
        return self.embedding_dim // self.n_heads
