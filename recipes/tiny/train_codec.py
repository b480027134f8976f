"""Train tiny's codec: a small descript-audio-codec DAC at 24 kHz, 50 frames/s, 8 codebooks.

Losses: waveform error, and multi-scale mel distance and commitment as in "High-Fidelity Audio
Compression with Improved RVQGAN" (Kumar et al., 2023), without its discriminators; the codes
are running means of encoder outputs. Codes that fall out of use are re-seeded, without which
most stay unused.

Progress, learning rate and the end follow --steps or --minutes of training time (summed over
resumed runs), whichever comes first. Run again with the same --out to resume. Finished, it
writes the averaged weights, rounded to bfloat16, as codec.safetensors.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import librosa
import numpy as np
import soundfile
import torch
from torch import nn

import codec_bridge
from codec_bridge.descript import import_dac

SAMPLE_RATE = 24_000
CONFIG = {
    "encoder_dim": 16,
    "encoder_rates": [2, 4, 6, 10],
    "latent_dim": 192,
    "decoder_dim": 384,
    "decoder_rates": [10, 6, 4, 2],
    "n_codebooks": 8,
    "codebook_size": 1024,
    "codebook_dim": 8,
    "quantizer_dropout": 0.5,
    "sample_rate": SAMPLE_RATE,
}
SCALES = [(64, 10), (128, 20), (256, 40), (512, 80), (1024, 150), (2048, 320)]  # window, mels
WAVE = 5.0  # weight of the waveform error: for long, mel distance alone gives noise without pitch
COMMITMENT = 0.05  # weight of the commitment loss beside the mel distance


class Snake(torch.autograd.Function):
    """x + sin²(αx)/α with its gradient written out: a third of autograd's passes over memory."""

    @staticmethod
    def forward(ctx, x, alpha):
        alpha = alpha.to(x.dtype)
        sine = torch.sin(alpha * x)
        ctx.save_for_backward(x, alpha, sine)
        return torch.addcmul(x, sine, sine / (alpha + 1e-9))

    @staticmethod
    def backward(ctx, gradient):
        x, alpha, sine = ctx.saved_tensors
        double_sine = torch.sin(2 * alpha * x)
        by_alpha = gradient * (double_sine * x - sine.square_() / alpha) / alpha
        by_alpha = by_alpha.sum((0, 2), keepdim=True, dtype=torch.float32)
        return torch.addcmul(gradient, gradient, double_sine), by_alpha


class Excerpts:
    """Random excerpts of the tracks on one side of the split, at about -24 LUFS."""

    def __init__(self, music: Path, names: list[str]):
        index = json.loads((music / "index.json").read_text())
        names = [n for n in names if n in index]
        if not names:
            sys.exit(f"no tracks of the split found in {music}; run cache_music.py first")
        self.names = names
        self.files = [music / f"{n}.wav" for n in names]
        self.lengths = [soundfile.info(file).frames for file in self.files]
        self.gains = [10 ** ((-24 - max(index[n]["loudness"], -60)) / 20) for n in names]
        seconds = np.array([index[n]["seconds"] for n in names])
        sources = np.array([n.split("/")[0] for n in names])
        weights = np.zeros(len(names))
        for source in set(sources):  # large sources are drawn more, but not in proportion
            here = sources == source
            weights[here] = seconds[here] / math.sqrt(seconds[here].sum())
        self.weights = weights / weights.sum()

    def draw(self, rng: np.random.Generator, n: int, samples: int, spread: float) -> torch.Tensor:
        """[n, 1, samples] float32; the gain varies by a normal of `spread` dB."""
        out = np.zeros((n, samples), np.float32)
        for row, i in enumerate(rng.choice(len(self.files), n, p=self.weights)):
            start = int(rng.integers(0, max(1, self.lengths[i] - samples)))
            excerpt, _ = soundfile.read(self.files[i], samples, start, dtype="float32")
            if np.abs(excerpt).max(initial=0) < 1e-3:  # silence teaches nothing: once more
                start = int(rng.integers(0, max(1, self.lengths[i] - samples)))
                excerpt, _ = soundfile.read(self.files[i], samples, start, dtype="float32")
            gain = self.gains[i] * 10 ** (np.clip(rng.normal(0, spread), -12, 9) / 20)
            excerpt *= min(gain, 1 / max(float(np.abs(excerpt).max()), 1e-4))
            out[row, : len(excerpt)] = excerpt * (rng.integers(0, 2) * 2 - 1)
        return torch.from_numpy(out)[:, None]


class MelDistance(nn.Module):
    """Sum over scales of the mean |difference| of log10 mel magnitudes (hop = window/4)."""

    def __init__(self, scales: list[tuple[int, int]]):
        super().__init__()
        self.scales = scales
        for window, mels in scales:
            filters = librosa.filters.mel(sr=SAMPLE_RATE, n_fft=window, n_mels=mels)
            self.register_buffer(f"filters_{window}", torch.from_numpy(filters))
            self.register_buffer(f"window_{window}", torch.hann_window(window))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        total = x.new_zeros(())
        both = torch.cat([x, y]).squeeze(1)
        for window, _ in self.scales:
            spectrum = torch.stft(
                both,
                window,
                window // 4,
                window=getattr(self, f"window_{window}"),
                pad_mode="constant",
                return_complex=True,
            )
            power = torch.view_as_real(spectrum).square().sum(-1)
            mel = getattr(self, f"filters_{window}") @ (power + 1e-12).sqrt()
            a, b = mel.clamp(min=1e-5).log10().chunk(2)
            total = total + (a - b).abs().mean()
        return total


@torch.no_grad()
def scale_layers(model: nn.Module, audio: torch.Tensor) -> None:
    """Start from layers whose outputs have unit variance on music, and quantisers that quantise.

    PyTorch's initial weights make the latents a thousand times smaller than the codes. So every
    convolution is scaled (LSUV, Mishkin and Matas, 2016), and every quantiser begins with the
    principal components of what the ones before it leave over, and codes drawn from them.
    """

    def unit(target: float) -> Callable:
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
            handles.append(layer.register_forward_hook(unit(target)))
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


class Codebooks:
    """Codes are running means of the encoder outputs that they stand for, as in SoundStream.

    (Learnt by gradient, they cannot keep up with the encoder in a run of some thousand steps.)
    Dead codes are re-seeded from recent encoder outputs.
    """

    def __init__(self, model: nn.Module, decay: float = 0.98):
        self.codes = [q.codebook.weight.requires_grad_(False) for q in model.quantizer.quantizers]
        self.uses = torch.zeros(len(self.codes), len(self.codes[0]))  # running mean per step
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

    def perplexity(self) -> torch.Tensor:
        p = self.uses / self.uses.sum(1, keepdim=True)
        return torch.exp(-(p * (p + 1e-10).log()).sum(1))


def forward(model: nn.Module, audio: torch.Tensor, bfloat16: bool):
    """One pass with the quantiser in float32 → audio, codes, latents, commitment, codebook."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        z = model.encoder(audio)
    z, codes, latents, commitment, codebook = model.quantizer(z.float())
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        out = model.decoder(z)
    return out.float(), codes, latents, commitment, codebook


def backward(model: nn.Module, audio: torch.Tensor, loss_of: MelDistance, bfloat16: bool):
    """Set the gradients of one part of the batch → codes, latents, mel distance, commitment."""
    torch.set_num_threads(1)
    model.zero_grad(set_to_none=True)
    out, codes, latents, commitment, _ = forward(model, audio, bfloat16)
    mel = loss_of(out, audio)
    wave = wave_error(out, audio)
    (mel + WAVE * wave + COMMITMENT * commitment).backward()
    return codes, latents.detach(), mel.item(), wave.item(), commitment.item()


def wave_error(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Energy of the error over that of `y`, treble lifted; 1 is what silence gets."""
    x, y = (a[..., 1:] - 0.8 * a[..., :-1] for a in (x, y))
    return ((x - y).square().mean((1, 2)) / (y.square().mean((1, 2)) + 1e-6)).mean()


@torch.no_grad()
def validate(model: nn.Module, ema: dict, excerpts: torch.Tensor, distance: MelDistance) -> float:
    """Mel distance of the averaged weights on fixed excerpts, in float32."""
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(ema)
    model.eval()
    values = [distance(x, forward(model, x, False)[0]).item() for x in excerpts.split(1)]
    model.train()
    model.load_state_dict(kept)
    return sum(values) / len(values)


def save(path: Path, content: dict) -> None:
    temporary = path.with_suffix(".part")
    torch.save(content, temporary)
    os.replace(temporary, path)


def export(ema: dict, folder: Path) -> None:
    """Write the averaged weights as `codec.safetensors`, rounded to bfloat16."""
    save(folder / "codec.pth", {"state_dict": ema, "metadata": {"kwargs": CONFIG}})
    codec = codec_bridge.load(folder / "codec.pth")
    codec_bridge.save(codec, folder / "codec.safetensors", dtype="bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("data/music"))
    parser.add_argument("--split", type=Path, default=Path(__file__).parent / "split.json")
    parser.add_argument("--out", type=Path, default=Path("runs/codec"))
    parser.add_argument("--minutes", type=float, default=60, help="training time, all runs")
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2, help="threads; divides the batch")
    parser.add_argument("--seconds", type=float, default=0.5, help="length of an excerpt")
    parser.add_argument("--learning-rate", type=float, default=2.5e-4)
    parser.add_argument("--clip", type=float, default=20.0, help="largest gradient norm")
    parser.add_argument("--float32", action="store_true", help="no bfloat16 convolutions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=float, default=5, help="minutes")
    parser.add_argument("--validate-every", type=float, default=12, help="minutes")
    a = parser.parse_args()
    for path in (a.data / "index.json", a.split):
        if not path.exists():
            sys.exit(f"{path} does not exist; run cache_music.py first")
    a.out.mkdir(parents=True, exist_ok=True)
    split = json.loads(a.split.read_text())
    train = Excerpts(a.data, split["train"])
    held = Excerpts(a.data, split["validation"]).draw(np.random.default_rng(1), 12, 96_000, 0)

    dac = import_dac()
    sys.modules["dac.nn.layers"].Snake1d.forward = lambda self, x: Snake.apply(x, self.alpha)
    torch.manual_seed(a.seed)
    model = dac.DAC(**CONFIG).train()
    scale_layers(model, train.draw(np.random.default_rng(0), 48, 12_000, 4.0))
    books = Codebooks(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=a.learning_rate, betas=(0.8, 0.99), weight_decay=0.01)
    ema = {k: v.clone() for k, v in model.state_dict().items()}
    # Threads that each run whole layers on their part of the batch: on a machine shared with
    # others this loses far less than splitting every operation between the cores.
    replicas = [model, *(dac.DAC(**CONFIG).train() for _ in range(a.workers - 1))]
    pool = ThreadPoolExecutor(a.workers)
    loss_of, distance = MelDistance(SCALES), MelDistance([(2048, 150), (512, 80)])
    step, spent = 0, 0.0
    checkpoint = a.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema, step, spent = state["ema"], state["step"], state["spent"]
        books.uses, books.sums = state["uses"], state["sums"]
        print(f"resumed at step {step}, after {spent / 60:.1f} minutes", flush=True)
    for replica in replicas[1:]:
        for parameter, own in zip(replica.parameters(), model.parameters(), strict=True):
            parameter.data = own.data
            parameter.requires_grad_(own.requires_grad)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.2f} M parameters, {len(train.names)} training tracks", flush=True)

    def progress() -> float:
        return min(1.0, max(step / a.steps, spent / (60 * a.minutes)))

    def checkpoint_now() -> None:
        state = {"model": model.state_dict(), "ema": ema, "optimizer": optimizer.state_dict()}
        state |= {
            "uses": books.uses,
            "sums": books.sums,
            "step": step,
            "spent": spent,
            "config": CONFIG,
        }
        save(checkpoint, state)

    saved = validated = spent
    sums = np.zeros(6)
    samples = int(a.seconds * SAMPLE_RATE) // 480 * 480
    while progress() < 1:
        started = time.monotonic()
        rng = np.random.default_rng((a.seed, step))
        torch.manual_seed(a.seed * 1_000_003 + step)
        rate = a.learning_rate * min(1, (step + 1) / 50) * (1 + math.cos(math.pi * progress())) / 2
        for group in optimizer.param_groups:
            group["lr"] = max(rate, 1e-6)
        audio = train.draw(rng, a.batch, samples, 4.0).chunk(a.workers)
        results = list(
            pool.map(lambda m, x: backward(m, x, loss_of, not a.float32), replicas, audio)
        )
        codes, latents = (torch.cat([r[i] for r in results]) for i in (0, 1))
        mel, wave, commitment = (float(np.mean([r[i] for r in results])) for i in (2, 3, 4))
        for parameter, *others in zip(*(m.parameters() for m in replicas), strict=True):
            if not parameter.requires_grad:
                continue
            for other in others:
                parameter.grad += other.grad
            parameter.grad /= a.workers
        norm = nn.utils.clip_grad_norm_(trained, a.clip)
        if torch.isfinite(norm):
            optimizer.step()
        decay = min(0.998, (1 + step) / (20 + step))
        with torch.no_grad():
            for key, value in model.state_dict().items():
                ema[key].lerp_(value, 1 - decay)
        books.update(codes, latents)
        if (step == 9 or step % 25 == 24) and progress() < 0.7:
            sums[5] += books.reseed(torch.Generator().manual_seed(step))
        sums[:5] += [mel, commitment, float(norm), 1, wave]
        step += 1
        spent += time.monotonic() - started
        if step % 50 == 0:
            n = sums[3]
            perplexity = " ".join(f"{p:.0f}" for p in books.perplexity())
            means = f"mel {sums[0] / n:.4f} wave {sums[4] / n:.3f}"
            means += f" commit {sums[1] / n:.3f} norm {sums[2] / n:.2f}"
            rest = f"reseeded {sums[5]:.0f} lr {rate:.1e} perplexity {perplexity}"
            print(f"step {step} minute {spent / 60:.1f} {means} {rest}", flush=True)
            sums[:] = 0
        if spent - saved > 60 * a.save_every:
            checkpoint_now()
            saved = spent
        if spent - validated > 60 * a.validate_every:
            value = validate(model, ema, held, distance)
            print(f"step {step} validation mel distance {value:.4f}", flush=True)
            validated = spent
    checkpoint_now()
    export(ema, a.out)
    print(
        f"finished: validation mel distance {validate(model, ema, held, distance):.4f}", flush=True
    )


if __name__ == "__main__":
    main()
