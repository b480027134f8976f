"""Train tiny's codec: a small descript-audio-codec DAC at 24 kHz, 25 frames/s, 16 codebooks.

Losses: waveform error, and multi-scale mel distance and commitment as in "High-Fidelity Audio
Compression with Improved RVQGAN" (Kumar et al., 2023), without its discriminators. The first
codebooks answer to other losses: they alone must tell the spectral envelope and which notes sound,
and must be the same for an excerpt turned upside down and moved by up to a frame. What sounds
alike then has the same first tokens, which a language model can learn (Moshi's codec does so with
a speech model's features; Défossez et al., 2024). The codes are running means of encoder outputs;
those that fall out of use are re-seeded, without which most stay unused.

Progress, learning rate and the end follow --steps or --minutes of training time (summed over
resumed runs), whichever comes first. Run again with the same --out to resume. Finished, it
writes the averaged weights, rounded to bfloat16, as codec.safetensors.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from codec_data import Excerpts, validation_excerpts
from codec_loop import Run, fingerprint, generators, share, trained, update
from codec_losses import (
    SCALES,
    SEMITONES,
    MelDistance,
    MelSpectrogram,
    Notes,
    swapped_prediction,
    wave_error,
)
from codec_model import CONFIG, HOP, SAMPLE_RATE, SPECTRAL, EMACodebooks, build, forward
from torch import nn

WAVE = 5.0  # weight of the waveform error: for long, mel distance alone gives noise without pitch
COMMITMENT = 0.025  # weight of the commitment loss beside the mel distance
ENVELOPE = 1.0  # weight of the envelope's error
NOTES = 4.0  # weight of the notes' error
DROPOUT = 0.25  # how often an excerpt is decoded from its first codebooks only
GAINS = 4.0  # standard deviation in dB of the gains of excerpts
MELS = 80  # bands of the envelope


@torch.no_grad()
def scale_layers(model: nn.Module, audio: torch.Tensor) -> None:
    """Start from layers whose outputs have unit variance on music, and quantisers that quantise.

    PyTorch's initial weights make the latents a thousand times smaller than the codes. So every
    convolution is scaled (LSUV, Mishkin and Matas, 2016), and every quantiser begins with the
    principal components of what the ones before it leave over, and codes drawn from them.
    """

    def to_deviation(target: float) -> Callable:
        def scale(layer: nn.Module, _: object, out: torch.Tensor) -> torch.Tensor:
            factor = target / out.std()
            layer.weight_g.mul_(factor)
            layer.bias.mul_(factor)
            return out * factor

        return scale

    handles = []
    for part in (model.encoder, model.decoder):
        layers = [m for m in part.modules() if isinstance(m, nn.Conv1d | nn.ConvTranspose1d)]
        ends = {unit.block[-1] for unit in part.modules() if type(unit).__name__ == "ResidualUnit"}
        for layer in layers:
            target = 0.5 if layer in ends else 1.0  # a residual unit adds little at first
            if part is model.decoder and layer is layers[-1]:
                target = float(audio.std())
            handles.append(layer.register_forward_hook(to_deviation(target)))
    z = model.encoder(audio)
    rest = z.transpose(1, 2).reshape(-1, z.shape[1])
    quantised = torch.zeros_like(rest)
    for quantizer in model.quantizer.quantizers:
        mean = rest.mean(0)
        _, vectors = torch.linalg.eigh((rest - mean).T @ (rest - mean))
        basis = vectors[:, -quantizer.codebook_dim :]  # [D, d]
        scale = 1 / ((rest - mean) @ basis).std()
        for layer, matrix in (
            (quantizer.in_proj, basis.T * scale),
            (quantizer.out_proj, basis / scale),
        ):
            layer.weight_v.copy_(matrix[..., None])
            layer.weight_g.copy_(matrix.norm(dim=1)[:, None, None])
        quantizer.in_proj.bias.copy_(-scale * (basis.T @ mean))
        quantizer.out_proj.bias.copy_(mean)
        latents = scale * (rest - mean) @ basis
        codes = latents[torch.randperm(len(latents))[: quantizer.codebook_size]]
        quantizer.codebook.weight[: len(codes)] = codes
        chosen = quantizer.decode_latents(latents.T[None])[0][0].T
        step = chosen @ basis.T / scale + mean
        rest, quantised = rest - step, quantised + step
    model.decoder(quantised.reshape(len(z), -1, z.shape[1]).transpose(1, 2))
    for handle in handles:
        handle.remove()


class CodecWithProbe(nn.Module):
    """The codec and what reads the spectrogram off its first codebooks (not kept)."""

    def __init__(self, dac: nn.Module):
        super().__init__()
        width = CONFIG["latent_dim"]
        self.dac = dac
        self.envelope, self.notes = MelSpectrogram(1024, MELS, HOP // 2), Notes(8192, HOP)
        self.head = nn.Sequential(
            nn.Conv1d(width, 256, 3, padding=1),
            nn.GELU(),
            nn.Conv1d(256, 2 * MELS + SEMITONES, 1),
        )

    def errors(
        self, quantised: torch.Tensor, audio: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean |difference| of the envelope, two columns per frame, and of the notes."""
        audio = audio.squeeze(1)
        mels, notes = self.head(quantised).split([2 * MELS, SEMITONES], dim=1)
        envelope = self.envelope(audio)[..., :-1].unflatten(2, (-1, 2)).transpose(2, 3)
        wrong = (mels.unflatten(1, (MELS, 2)) - envelope).abs().mean()  # of [B, mels, 2, T]
        # A frame's middle lies between two columns.
        columns = self.notes(audio)
        return wrong, (notes - (columns[..., :-1] + columns[..., 1:]) / 2).abs().mean()


class Result(NamedTuple):
    """Of one part of a batch: what the codebooks are fed, and the losses by name."""

    codes: torch.Tensor  # [B, C, T]
    latents: torch.Tensor  # [B, C · d, T]
    losses: dict[str, float]


def backward(
    model: CodecWithProbe,
    audio: torch.Tensor,
    rng: np.random.Generator,
    use: torch.Tensor,
    same: float,
    loss_of: MelDistance,
    bfloat16: bool,
) -> Result:
    """Set the gradients of one part of the batch, [B, 1, samples] with a frame too many."""
    torch.set_num_threads(1)
    model.zero_grad(set_to_none=True)
    n = CONFIG["n_codebooks"]
    few = rng.random(len(audio)) < DROPOUT
    keep = torch.from_numpy(np.where(few, rng.integers(SPECTRAL, n, len(audio)), n))
    moved = int(rng.integers(1, HOP))
    shifted = -audio[..., moved : moved + (audio.shape[-1] - HOP) // (2 * HOP) * HOP]
    audio = audio[..., :-HOP]
    out, quantised = forward(model.dac, audio, keep, bfloat16)
    envelope, notes = model.errors(quantised.z_q_spectral, audio)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        z = model.dac.encoder(shifted)
    first = quantised.codes[:, :SPECTRAL, : z.shape[-1]]
    losses = {
        "mel": loss_of(out, audio),
        "wave": (wave_error(out, audio) * keep / n).mean(),
        "envelope": envelope,
        "notes": notes,
        "same": swapped_prediction(model.dac, z.float(), first, use),
        "commit": quantised.commitment,
    }
    weights = {"mel": 1.0, "wave": WAVE, "commit": COMMITMENT}
    weights |= {"envelope": ENVELOPE, "notes": NOTES, "same": same}
    sum(weights[k] * v for k, v in losses.items()).backward()
    values = {k: v.item() for k, v in losses.items()}
    return Result(quantised.codes, quantised.latents.detach(), values)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--music", type=Path, default=Path("data/music"))
    parser.add_argument("--split", type=Path, default=Path(__file__).parent / "split.json")
    parser.add_argument("--out", type=Path, default=Path("runs/codec"))
    parser.add_argument("--init", type=Path, help="checkpoint.pt of another run to begin from")
    parser.add_argument("--minutes", type=float, default=60, help="training time, all runs")
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2, help="threads; divides the batch")
    parser.add_argument("--seconds", type=float, default=0.64, help="length of an excerpt")
    parser.add_argument("--learning-rate", type=float, default=2.5e-4)
    parser.add_argument(
        "--same", type=float, default=0.1, help="weight of the first codebooks' dependence on phase"
    )
    parser.add_argument("--float32", action="store_true", help="no bfloat16 convolutions")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    if a.batch % a.workers:
        parser.error(f"--batch {a.batch} must be a multiple of --workers {a.workers}")
    for path in (a.music / "index.json", a.split):
        if not path.exists():
            sys.exit(f"{path} does not exist; run cache_music.py first")
    split = json.loads(a.split.read_text())
    music = Excerpts(a.music, split["train"])
    held = validation_excerpts(a.music, split)

    torch.manual_seed(a.seed)
    model = CodecWithProbe(build())
    scale_layers(model.dac, music.draw(np.random.default_rng(0), 96, 16 * HOP, GAINS))
    books = EMACodebooks(model.dac)
    begun_from = ""
    if a.init:
        state = torch.load(a.init, weights_only=True)
        model.load_state_dict(state["model"])
        model.dac.load_state_dict(state["ema"])
        books.load(state)
        books.centre(model.dac, SPECTRAL)
        begun_from = fingerprint(state["ema"])
    optimizer = torch.optim.AdamW(trained(model), lr=a.learning_rate, betas=(0.8, 0.99))
    run = Run(
        a.out,
        model.dac,
        optimizer,
        held,
        lambda: {"model": model.state_dict()} | books.state(),
        minutes=a.minutes,
        steps=a.steps,
        learning_rate=a.learning_rate,
        begun_from=begun_from,
    )
    if state := run.resume():
        model.load_state_dict(state["model"])
        books.load(state)
    replicas = [model]
    replicas += [share(CodecWithProbe(build()), model) for _ in range(a.workers - 1)]
    pool, loss_of = ThreadPoolExecutor(a.workers), MelDistance(SCALES)
    parameters = sum(p.numel() for p in model.dac.parameters())
    print(f"{parameters / 1e6:.2f} M parameters, {len(music.names)} training tracks", flush=True)
    samples = int(a.seconds * SAMPLE_RATE) // HOP * HOP + HOP
    for step in run.steps():
        rng, *rngs = generators(a.seed, step, 1 + a.workers)
        audio = music.draw(rng, a.batch, samples, GAINS).chunk(a.workers)
        use = books.log_shares(SPECTRAL)
        work = functools.partial(
            backward, use=use, same=a.same, loss_of=loss_of, bfloat16=not a.float32
        )
        results = list(pool.map(work, replicas, audio, rngs))
        norm, finite = update(optimizer, replicas)
        if finite:
            books.update(*(torch.cat([r[i] for r in results]) for i in (0, 1)))
            if (step == 9 or step % 25 == 24) and run.progress < 0.7:
                run.note("reseeded", books.reseed(torch.Generator().manual_seed(step)))
        run.note("norm", norm)
        run.note("perplexity", books.perplexity().mean().item())
        for result in results:
            for name, value in result.losses.items():
                run.note(name, value)


if __name__ == "__main__":
    main()
