"""LAC, the codec of the original VampNet, as plain PyTorch modules for inference.

It is descript-audio-codec's DAC with another decoder: after every upsampling the mean of three
residual stacks with kernels 3, 7 and 11 in place of one stack. Weight normalisation is folded
into plain convolutions when a file is read. Attributes are named as in the original's files, so
that keys map one to one.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional


class Snake(nn.Module):
    """Periodic activation x + sin²(αx) / (α + 1e-9) with one α per channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        # In place on the one temporary: at full size an activation takes over 100 MB.
        wave = torch.sin(self.alpha * x).square_()
        return wave.mul_((self.alpha + 1e-9).reciprocal()).add_(x)


def _same(channels: int, kernel: int, dilation: int = 1) -> nn.Conv1d:
    padding = dilation * (kernel - 1) // 2
    return nn.Conv1d(channels, channels, kernel, dilation=dilation, padding=padding)


class ResidualUnit(nn.Module):
    """x + conv1(snake(conv7(snake(x)))), the first convolution dilated."""

    def __init__(self, channels: int, dilation: int):
        super().__init__()
        self.block = nn.Sequential(
            Snake(channels), _same(channels, 7, dilation), Snake(channels), _same(channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x).add_(x)


class EncoderBlock(nn.Module):
    """Three residual units, then downsampling by `stride` to twice the channels."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.block = nn.Sequential(
            *(ResidualUnit(channels, dilation) for dilation in (1, 3, 9)),
            Snake(channels),
            nn.Conv1d(channels, 2 * channels, 2 * stride, stride, padding=stride // 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class Encoder(nn.Module):
    """Audio [B, 1, samples] to latents [B, latent_dim, frames]."""

    def __init__(self, width: int, strides: Sequence[int], latent_dim: int):
        super().__init__()
        blocks: list[nn.Module] = [nn.Conv1d(1, width, 7, padding=3)]
        for stride in strides:
            blocks.append(EncoderBlock(width, stride))
            width *= 2
        blocks += [Snake(width), nn.Conv1d(width, latent_dim, 3, padding=1)]
        self.block = nn.Sequential(*blocks)

    def forward(self, audio: Tensor) -> Tensor:
        return self.block(audio)


class Stage(nn.Module):
    """One stage of the residual quantiser: project down, nearest codebook row, project up."""

    def __init__(self, latent_dim: int, codebook_size: int, codebook_dim: int):
        super().__init__()
        self.in_proj = nn.Conv1d(latent_dim, codebook_dim, 1)
        self.out_proj = nn.Conv1d(codebook_dim, latent_dim, 1)
        self.codebook = nn.Embedding(codebook_size, codebook_dim)

    def nearest(self, projected: Tensor) -> Tensor:
        """Row nearest to each vector once both have length one: [B, d, T] -> int64 [B, T]."""
        directions = functional.normalize(projected.transpose(1, 2), dim=-1)
        # Between unit vectors the smallest distance is the largest inner product.
        return (directions @ functional.normalize(self.codebook.weight, dim=-1).T).argmax(-1)

    def up(self, tokens: Tensor) -> Tensor:
        """Codebook rows of tokens [B, T], as they are, projected to [B, latent_dim, T]."""
        return self.out_proj(self.codebook(tokens).transpose(1, 2))


class Quantiser(nn.Module):
    """Residual vector quantiser; every stage quantises what the ones before it left over.

    `forward` and `from_codes` give their results in the order of descript-audio-codec's
    ResidualVectorQuantize, so that one driver runs both.
    """

    def __init__(self, stages: int, latent_dim: int, codebook_size: int, codebook_dim: int):
        super().__init__()
        self.quantizers = nn.ModuleList(
            Stage(latent_dim, codebook_size, codebook_dim) for _ in range(stages)
        )

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents [B, latent_dim, T] to (quantised latents, tokens [B, C, T], projections).

        The projections [B, C·d, T] are what each stage saw before it chose a row.
        """
        residual, quantised = latents, torch.zeros_like(latents)
        tokens, projections = [], []
        for stage in self._stages():
            projected = stage.in_proj(residual)
            chosen = stage.nearest(projected)
            approximation = stage.up(chosen)
            residual, quantised = residual - approximation, quantised + approximation
            tokens.append(chosen)
            projections.append(projected)
        return quantised, torch.stack(tokens, 1), torch.cat(projections, 1)

    def from_codes(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, C, T], C at most the number of stages, to (quantised latents, tokens)."""
        stages = zip(self._stages(), tokens.unbind(1), strict=False)
        return functools.reduce(torch.add, (stage.up(chosen) for stage, chosen in stages)), tokens

    def _stages(self) -> Iterator[Stage]:
        return cast(Iterator[Stage], iter(self.quantizers))


class ResidualLayer(nn.Module):
    """x + conv(snake(conv(snake(x)))), both with the stack's kernel, the first one dilated."""

    def __init__(self, channels: int, kernel: int, dilation: int):
        super().__init__()
        self.layer = nn.Sequential(
            Snake(channels),
            _same(channels, kernel, dilation),
            Snake(channels),
            _same(channels, kernel),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).add_(x)


class ResidualStack(nn.Module):
    """Residual layers of one kernel with dilations 1, 3 and 5."""

    def __init__(self, channels: int, kernel: int):
        super().__init__()
        self.block = nn.Sequential(
            *(ResidualLayer(channels, kernel, dilation) for dilation in (1, 3, 5))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class ParallelStacks(nn.Module):
    """The mean of three residual stacks with kernels 3, 7 and 11."""

    def __init__(self, channels: int):
        super().__init__()
        self.mrf_blocks = nn.ModuleList(ResidualStack(channels, k) for k in (3, 7, 11))

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.mrf_blocks
        total = first(x)
        for stack in others:
            total.add_(stack(x))
        return total.div_(len(self.mrf_blocks))


class DecoderBlock(nn.Module):
    """Upsampling by `stride` to half the channels, then the parallel stacks."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        half = channels // 2
        self.block = nn.Sequential(
            Snake(channels),
            nn.ConvTranspose1d(channels, half, 2 * stride, stride, padding=stride // 2),
            ParallelStacks(half),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class Decoder(nn.Module):
    """Quantised latents [B, latent_dim, frames] to audio [B, 1, samples] in −1 … 1."""

    def __init__(self, latent_dim: int, width: int, strides: Sequence[int]):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv1d(latent_dim, width, 7, padding=3)]
        for stride in strides:
            layers.append(DecoderBlock(width, stride))
            width //= 2
        layers += [Snake(width), nn.Conv1d(width, 1, 7, padding=3), nn.Tanh()]
        self.model = nn.Sequential(*layers)

    def forward(self, latents: Tensor) -> Tensor:
        return self.model(latents)


class LAC(nn.Module):
    """Encoder, residual quantiser and decoder."""

    def __init__(
        self,
        encoder_dim: int,
        encoder_rates: Sequence[int],
        latent_dim: int,
        decoder_dim: int,
        decoder_rates: Sequence[int],
        n_codebooks: int,
        codebook_size: int,
        codebook_dim: int,
    ):
        super().__init__()
        self.encoder = Encoder(encoder_dim, encoder_rates, latent_dim)
        self.quantizer = Quantiser(n_codebooks, latent_dim, codebook_size, codebook_dim)
        self.decoder = Decoder(latent_dim, decoder_dim, decoder_rates)
