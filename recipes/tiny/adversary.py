"""descript-audio-codec's multi-resolution discriminator and its losses, to train decoders against.

"High-Fidelity Audio Compression with Improved RVQGAN" (Kumar et al., 2023), section 3.4: least
squares, and the distance of the features that it finds in music and in what was decoded. Without
its multi-period discriminators, whose 38 M parameters take six times as long on a CPU.
"""

import importlib

import torch
from torch import nn

from codec_bridge.descript import import_dac


def new_discriminator(sample_rate: int) -> nn.Module:
    """Audio [B, 1, samples] → per resolution the features of every layer, its verdict last."""
    import_dac()
    module = importlib.import_module("dac.model.discriminator")
    return module.Discriminator(periods=[], sample_rate=sample_rate)


def discriminator_loss(
    discriminator: nn.Module, made: torch.Tensor, music: torch.Tensor
) -> torch.Tensor:
    """Small where music is found to be 1 and what was `made` 0. `made` gets no gradient."""
    verdicts = zip(discriminator(made.detach()), discriminator(music), strict=True)
    return sum(
        fake[-1].float().square().mean() + (1 - real[-1].float()).square().mean()
        for fake, real in verdicts
    )


def decoder_losses(
    discriminator: nn.Module, made: torch.Tensor, music: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """How far `made` is from being taken for music, and the distance of its features."""
    with torch.no_grad():
        real = discriminator(music)
    fake = discriminator(made)
    verdict = sum((1 - layers[-1].float()).square().mean() for layers in fake)
    features = sum(
        (a.float() - b.float()).abs().mean()
        for layers, others in zip(fake, real, strict=True)
        for a, b in zip(layers[:-1], others[:-1], strict=True)
    )
    return verdict, features
