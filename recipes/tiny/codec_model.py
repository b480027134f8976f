"""tiny's codec in training: descript-audio-codec's DAC, its quantisers, its files (a module)."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import snake
import torch
from safetensors.torch import load_file
from torch import nn

import codec_bridge
from codec_bridge.atomic import atomic_write
from codec_bridge.descript import import_dac
from codec_bridge.pth import weight_norm

SAMPLE_RATE = 24_000
CONFIG = {
    "encoder_dim": 16,
    "encoder_rates": [4, 4, 6, 10],
    "latent_dim": 192,
    "decoder_dim": 448,
    "decoder_rates": [10, 6, 4, 4],
    "n_codebooks": 16,
    "codebook_size": 1024,
    "codebook_dim": 8,
    "quantizer_dropout": 0.0,  # ours is in `quantise`
    "sample_rate": SAMPLE_RATE,
}
HOP = math.prod(CONFIG["encoder_rates"])
"""Samples per frame."""
SPECTRAL = 4
"""How many codebooks tell envelope and notes by themselves."""


def build() -> nn.Module:
    """A `dac.DAC` of these sizes with PyTorch's initial weights."""
    dac = import_dac()
    snake.use_in_dac()
    return dac.DAC(**CONFIG)


def codebooks(dac: nn.Module) -> np.ndarray:
    """[C, V, d] its codes."""
    return np.stack([q.codebook.weight.detach().numpy() for q in dac.quantizer.quantizers])


class Quantised(NamedTuple):
    """What the quantisers make of latents [B, D, T]."""

    z_q: torch.Tensor  # [B, D, T], of the codebooks that are kept
    z_q_spectral: torch.Tensor  # [B, D, T], of the first SPECTRAL ones
    codes: torch.Tensor  # [B, C, T]
    latents: torch.Tensor  # [B, C · d, T], before quantisation
    commitment: torch.Tensor  # loss, summed over the codebooks that are kept


def quantise(dac: nn.Module, z: torch.Tensor, keep: torch.Tensor, apart: bool = True) -> Quantised:
    """Quantise z [B, D, T] with the first keep[b] codebooks.

    With `apart`, what the first codebooks tell is not pulled at by the losses of the waveform.
    """
    residual, z_q, spectral = z, torch.zeros_like(z), torch.zeros_like(z)
    codes, latents, commitment = [], [], z.new_zeros(())
    for i, quantizer in enumerate(dac.quantizer.quantizers):
        z_q_i, commit, _, tokens, latent = quantizer(residual)
        kept = (keep > i).to(z.dtype)
        if i < SPECTRAL:
            spectral = spectral + z_q_i
            z_q_i = z_q_i.detach() if apart else z_q_i
        z_q = z_q + z_q_i * kept[:, None, None]
        residual = residual - z_q_i
        commitment = commitment + (commit * kept).mean()
        codes.append(tokens)
        latents.append(latent)
    return Quantised(z_q, spectral, torch.stack(codes, 1), torch.cat(latents, 1), commitment)


def forward(
    dac: nn.Module, audio: torch.Tensor, keep: torch.Tensor, bfloat16: bool
) -> tuple[torch.Tensor, Quantised]:
    """Encode, quantise (in float32) and decode [B, 1, samples]."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        z = dac.encoder(audio)
    quantised = quantise(dac, z.float(), keep)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        out = dac.decoder(quantised.z_q)
    return out.float(), quantised


@torch.no_grad()
def fit_codes(dac: nn.Module, z: torch.Tensor, iterations: int = 8) -> torch.Tensor:
    """Move the codes to the means of what they stand for, by Lloyd's algorithm.

    Running means come late: with the encoder moving under them fewer codes are used than could be.
    Codes that nothing uses stay as they are.

    Args:
      z: [N, D] encoder outputs.

    Returns:
      [C, V] how many of them use each code.
    """
    residual, uses = z.T[None], []
    for quantizer in dac.quantizer.quantizers:
        codes = quantizer.codebook.weight
        latents = quantizer.in_proj(residual)
        points = latents[0].T
        for _ in range(iterations):
            tokens = nearest(quantizer, latents)
            counts = torch.bincount(tokens, minlength=len(codes))
            sums = torch.zeros_like(codes).index_add_(0, tokens, points)
            used = counts > 0
            codes[used] = sums[used] / counts[used, None]
        tokens = nearest(quantizer, latents)
        uses.append(torch.bincount(tokens, minlength=len(codes)))
        residual = residual - quantizer.out_proj(codes[tokens].T[None])
    return torch.stack(uses)


def nearest(quantizer: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """[N] tokens of latents [1, d, N], as the quantiser chooses them, in parts that fit."""
    return torch.cat([quantizer.decode_latents(part)[1][0] for part in latents.split(8192, dim=2)])


def perplexity(uses: torch.Tensor) -> torch.Tensor:
    """[C] exp(entropy) of how often codes are used [C, V]."""
    p = uses / uses.sum(1, keepdim=True)
    return torch.exp(-(p * (p + 1e-10).log()).sum(1))


class EMACodebooks:
    """Codes are running means of the encoder outputs that they stand for, as in SoundStream.

    (Learnt by gradient, they cannot keep up with the encoder in a run of some thousand steps.)
    Dead codes are re-seeded from recent encoder outputs.
    """

    def __init__(self, model: nn.Module, decay: float = 0.995):
        self.codes = [q.codebook.weight.requires_grad_(False) for q in model.quantizer.quantizers]
        self.uses = torch.zeros(len(self.codes), len(self.codes[0]))  # running mean per update
        self.sums = torch.zeros(len(self.codes), *self.codes[0].shape)
        self.decay = decay
        self.recent: list[list[torch.Tensor]] = [[] for _ in self.codes]

    @torch.no_grad()
    def update(self, tokens: torch.Tensor, latents: torch.Tensor) -> None:
        """tokens [B, C, T], latents [B, C·d, T] (before quantisation)."""
        for c, z in enumerate(latents.chunk(len(self.codes), dim=1)):
            z = z.transpose(1, 2).reshape(-1, z.shape[1])
            chosen = tokens[:, c].reshape(-1)
            self.uses[c] *= self.decay
            self.sums[c] *= self.decay
            self.uses[c].index_add_(0, chosen, torch.full((len(z),), 1 - self.decay))
            self.sums[c].index_add_(0, chosen, z * (1 - self.decay))
            used = self.uses[c] > 1e-4
            self.codes[c][used] = self.sums[c][used] / self.uses[c][used, None]
            self.recent[c] = [*self.recent[c][-19:], z]

    @torch.no_grad()
    def reseed(self, generator: torch.Generator, threshold: float = 0.03) -> int:
        """Replace the codes used less than `threshold` of the uniform share."""
        total = 0
        for c, codes in enumerate(self.codes):
            pool = torch.cat(self.recent[c])
            uniform = self.uses[c].sum() / len(codes)
            dead = (self.uses[c] < threshold * uniform).nonzero()[:, 0][: len(pool)]
            codes[dead] = pool[torch.randperm(len(pool), generator=generator)[: len(dead)]]
            self.uses[c, dead] = 0.2 * uniform  # some time to come into use
            self.sums[c, dead] = codes[dead] * self.uses[c, dead, None]
            total += len(dead)
        return total

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold beside the codes."""
        return {"uses": self.uses, "sums": self.sums}

    def load(self, state: dict) -> None:
        """Continue from a checkpoint that holds `state`."""
        self.uses, self.sums = state["uses"], state["sums"]

    def log_shares(self, n: int) -> torch.Tensor:
        """[n, V] how often the codes of the first n codebooks were used of late."""
        uses = self.uses[:n]
        return (uses / uses.sum(1, keepdim=True).clamp(min=1e-9) + 1e-5).log()

    @torch.no_grad()
    def centre(self, model: nn.Module, n: int) -> None:
        """Move the first n quantisers' latents so that the mean code is 0: directions differ."""
        for c, quantizer in enumerate(model.quantizer.quantizers[:n]):
            mean = self.sums[c].sum(0) / self.uses[c].sum()
            quantizer.in_proj.bias -= mean
            at_mean, at_zero = quantizer.out_proj(torch.stack([mean, 0 * mean])[..., None])
            quantizer.out_proj.bias += (at_mean - at_zero)[:, 0]
            self.codes[c] -= mean
            self.sums[c] -= mean * self.uses[c][:, None]

    def perplexity(self) -> torch.Tensor:
        return perplexity(self.uses)


def read_codec(path: Path) -> dict[str, torch.Tensor]:
    """The state of a `dac.DAC`, weights normalised, from a codec that any of the recipes wrote."""
    if path.suffix != ".safetensors":
        saved = torch.load(path, weights_only=True)
        return saved["ema"] if "ema" in saved else saved["state_dict"]
    state = {}
    for name, tensor in load_file(path).items():
        tensor = tensor.float()
        if name.endswith(".weight") and tensor.ndim == 3:  # of a convolution
            state[f"{name}_g"] = torch.from_numpy(weight_norm(tensor.numpy()))
            name = f"{name}_v"
        state[name] = tensor
    return state


def export(state: dict[str, torch.Tensor], folder: Path) -> None:
    """Write a codec as `codec.safetensors`, rounded to bfloat16."""
    with atomic_write(folder / "codec.pth") as path:
        torch.save({"state_dict": state, "metadata": {"kwargs": CONFIG}}, path)
    codec = codec_bridge.load(folder / "codec.pth")
    codec_bridge.save(codec, folder / "codec.safetensors", dtype="bfloat16")
