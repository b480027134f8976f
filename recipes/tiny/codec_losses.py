"""What the codec's trainings compare sound by (a module).

Mel distance as in "High-Fidelity Audio Compression with Improved RVQGAN" (Kumar et al., 2023), the
waveform, notes, treble that repeats with the frames, and codes that should be alike.
"""

from collections.abc import Iterable

import librosa
import numpy as np
import scipy.signal
import torch
from codec_model import HOP, SAMPLE_RATE
from torch import nn

SCALES = ((64, 10), (128, 20), (256, 40), (512, 80), (1024, 150), (2048, 320))
"""Windows and mel bands of the loss."""
SEMITONES = 72
"""Bands of the notes, from C2 (65 Hz) up."""
SHARPNESS = 20.0
"""Of the probabilities of codes, by cosine."""


class MelSpectrogram(nn.Module):
    """log10 mel magnitudes [B, mels, columns] of audio [B, samples]."""

    def __init__(self, window: int, mels: int, hop: int):
        super().__init__()
        self.sizes = window, hop
        filters = librosa.filters.mel(sr=SAMPLE_RATE, n_fft=window, n_mels=mels)
        self.register_buffer("filters", torch.from_numpy(filters), persistent=False)
        self.register_buffer("window", torch.hann_window(window), persistent=False)

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        spectrum = torch.stft(
            audio, *self.sizes, window=self.window, pad_mode="constant", return_complex=True
        )
        power = torch.view_as_real(spectrum).square().sum(-1)
        return (self.filters @ (power + 1e-12).sqrt()).clamp(min=1e-5).log10()


class Notes(nn.Module):
    """log10(1 + magnitude) of semitones [B, semitones, columns] of audio [B, samples]."""

    def __init__(self, window: int, hop: int):
        super().__init__()
        self.sizes = window, hop
        hertz = torch.fft.rfftfreq(window, 1 / SAMPLE_RATE)
        semitone = 12 * torch.log2(hertz.clamp(min=1) / 65.406)  # above C2
        distance = (semitone - torch.arange(SEMITONES)[:, None]).abs()
        self.register_buffer("filters", (1 - distance).clamp(min=0), persistent=False)
        self.register_buffer("window", torch.hann_window(window), persistent=False)

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        spectrum = torch.stft(
            audio, *self.sizes, window=self.window, pad_mode="constant", return_complex=True
        )
        return (1 + (self.filters @ spectrum.abs().square()).sqrt()).log10()


class MelDistance(nn.Module):
    """Sum over scales of the mean |difference| of log10 mel magnitudes (hop = window/4)."""

    def __init__(self, scales: Iterable[tuple[int, int]]):
        super().__init__()
        self.spectrograms = nn.ModuleList(MelSpectrogram(w, m, w // 4) for w, m in scales)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        both = torch.cat([x, y]).squeeze(1)
        pairs = (spectrogram(both).chunk(2) for spectrogram in self.spectrograms)
        return sum((a - b).abs().mean() for a, b in pairs)


def wave_error(x: torch.Tensor, y: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
    """[B] energy of the error over that of y [B, 1, samples], treble lifted; silence gets 1.

    Only of samples where `kept` [samples] is 1.
    """
    x, y = (a[..., 1:] - 0.8 * a[..., :-1] for a in (x, y))
    kept = torch.ones_like(y[0, 0]) if kept is None else kept[1:]
    energy = (y.square() * kept).sum((1, 2)) + 1e-6 * (kept.sum() + 1)
    return ((x - y).square() * kept).sum((1, 2)) / energy


SILENT = 0.05
"""Norm of a band below which it counts as silence: -70 dBFS for a second."""


class Buzz(nn.Module):
    """How differently alike two bands of `x` and of `y` are to themselves a frame later.

    The decoder sees nothing but frames: what it makes alike in all of them has the pitch of the
    frame rate. Mean |difference| of the correlations, one and two frames later.
    """

    def __init__(self, above: float = 600.0, middle: float = 1500.0, taps: int = 257):
        super().__init__()
        bands = [
            scipy.signal.firwin(taps, [above, middle], pass_zero="bandpass", fs=SAMPLE_RATE),
            scipy.signal.firwin(taps, middle, pass_zero="highpass", fs=SAMPLE_RATE),
        ]
        self.register_buffer("filters", torch.from_numpy(np.stack(bands)).float()[:, None])

    def autocorrelation(self, x: torch.Tensor) -> torch.Tensor:
        """[4] correlations of both bands of [1, 1, samples] with themselves."""
        bands = nn.functional.conv1d(x, self.filters)[0]
        pairs = ((bands[:, lag:], bands[:, :-lag]) for lag in (HOP, 2 * HOP))
        return torch.cat([nn.functional.cosine_similarity(*p, dim=1, eps=SILENT) for p in pairs])

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (self.autocorrelation(x) - self.autocorrelation(y)).abs().mean()


class Losses(nn.Module):
    """What a decoded excerpt is compared by, by name, and `weights` of these and the
    discriminator's."""

    def __init__(self, notes: float, wave: float, buzz: float, adversarial: float):
        super().__init__()
        self.weights = {"mel": 1.0, "notes": notes, "wave": wave, "buzz": buzz}
        self.weights |= {"adversarial": adversarial, "feature_matching": 2 * adversarial}
        self.mel, self.notes, self.buzz = MelDistance(SCALES), Notes(8192, HOP), Buzz()

    def forward(
        self, out: torch.Tensor, audio: torch.Tensor, kept: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Of [1, 1, samples] and the music; `kept` [samples] is 1 where the phase is known."""
        notes = (self.notes(out.squeeze(1)) - self.notes(audio.squeeze(1))).abs().mean()
        losses = {"mel": self.mel(out, audio), "notes": notes}
        return losses | {"wave": wave_error(out, audio, kept).mean(), "buzz": self.buzz(out, audio)}


def swapped_prediction(
    dac: nn.Module, z: torch.Tensor, codes: torch.Tensor, use: torch.Tensor
) -> torch.Tensor:
    """Minus the nats per token that z [B, D, T] tells of another's first codes [B, SPECTRAL, T].

    Swapped prediction as in SwAV (Caron et al., 2020), less the entropy of the codes, whose
    gradient comes from their running log shares `use` [SPECTRAL, V]: with a mere distance all
    latents would become alike.
    """
    total = z.new_zeros(())
    quantizers = dac.quantizer.quantizers
    for quantizer, tokens, log_shares in zip(quantizers, codes.unbind(1), use, strict=False):
        with torch.no_grad():
            step = quantizer.out_proj(quantizer.decode_code(tokens))
            directions = nn.functional.normalize(quantizer.codebook.weight)
        latents = nn.functional.normalize(quantizer.in_proj(z))
        logits = SHARPNESS * torch.einsum("vd,bdt->bvt", directions, latents)
        expected = torch.einsum("bvt,v->bt", logits.softmax(1), log_shares)
        total = total + nn.functional.cross_entropy(logits, tokens) + expected.mean()
        z = z - step
    return total / codes.shape[1]
