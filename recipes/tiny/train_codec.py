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
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import librosa
import numpy as np
import snake
import soundfile
import torch
from torch import nn

import codec_bridge
from codec_bridge.descript import import_dac

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
SCALES = [(64, 10), (128, 20), (256, 40), (512, 80), (1024, 150), (2048, 320)]  # window, mels
WAVE = 5.0  # weight of the waveform error: for long, mel distance alone gives noise without pitch
COMMITMENT = 0.025  # weight of the commitment loss beside the mel distance
SPECTRAL = 4  # how many codebooks tell envelope and notes by themselves
SPECTRUM = 1.0  # weight of the envelope's error
NOTES = 4.0  # weight of the notes' error
SAME = 0.5  # weight of the first codebooks' dependence on phase
SHIFT = 960  # samples by which audio may move without changing them: a frame
SHARPNESS = 20.0  # of the probabilities of codes, by cosine
MELS, SEMITONES = 80, 72  # bands of the envelope; of the notes, from C2 (65 Hz) up


def track_weights(sources: list[str], seconds: list[float]) -> np.ndarray:
    """How often to draw from each track: from large sources more, but not in proportion."""
    weights = np.array(seconds)
    for source in set(sources):
        here = np.array(sources) == source
        weights[here] /= math.sqrt(weights[here].sum())
    return weights / weights.sum()


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
        self.weights = track_weights(
            [n.split("/")[0] for n in names], [index[n]["seconds"] for n in names]
        )

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

    def __init__(self, scales: list[tuple[int, int]]):
        super().__init__()
        self.spectrograms = nn.ModuleList(MelSpectrogram(w, m, w // 4) for w, m in scales)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        both = torch.cat([x, y]).squeeze(1)
        pairs = (spectrogram(both).chunk(2) for spectrogram in self.spectrograms)
        return sum((a - b).abs().mean() for a, b in pairs)


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
        p = self.uses / self.uses.sum(1, keepdim=True)
        return torch.exp(-(p * (p + 1e-10).log()).sum(1))


class Trained(nn.Module):
    """The codec and what reads the spectrogram off its first codebooks (not kept)."""

    def __init__(self, dac: nn.Module):
        super().__init__()
        width, hop = CONFIG["latent_dim"], math.prod(CONFIG["encoder_rates"])
        self.dac = dac
        self.envelope, self.notes = MelSpectrogram(1024, MELS, hop // 2), Notes(8192, hop)
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


def ignorance(
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


def quantise(dac: nn.Module, z: torch.Tensor, keep: torch.Tensor, apart: bool = True):
    """Quantise z [B, D, T] with the first keep[b] codebooks → sum, sum of the first, codes, …

    With `apart`, what the first codebooks tell is not pulled at by the losses of the waveform.
    """
    rest, total, spectral = z, torch.zeros_like(z), torch.zeros_like(z)
    codes, latents, commitment = [], [], z.new_zeros(())
    for i, quantizer in enumerate(dac.quantizer.quantizers):
        step, commit, _, tokens, latent = quantizer(rest)
        kept = (keep > i).to(z.dtype)
        if i < SPECTRAL:
            spectral = spectral + step
            step = step.detach() if apart else step
        total = total + step * kept[:, None, None]
        rest = rest - step
        commitment = commitment + (commit * kept).mean()
        codes.append(tokens)
        latents.append(latent)
    return total, spectral, torch.stack(codes, 1), torch.cat(latents, 1), commitment


def forward(dac: nn.Module, audio: torch.Tensor, keep: torch.Tensor, bfloat16: bool):
    """One pass, the quantiser in float32 → audio and what `quantise` gives."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        z = dac.encoder(audio)
    quantised = quantise(dac, z.float(), keep)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        out = dac.decoder(quantised[0])
    return out.float(), quantised


def backward(
    model: Trained, audio: torch.Tensor, use: torch.Tensor, loss_of: nn.Module, bfloat16: bool
):
    """Set the gradients of one part of the batch → codes, latents, and the losses by name."""
    torch.set_num_threads(1)
    model.zero_grad(set_to_none=True)
    n = CONFIG["n_codebooks"]
    keep = torch.where(torch.rand(len(audio)) < 0.25, torch.randint(SPECTRAL, n, (len(audio),)), n)
    moved = int(torch.randint(1, SHIFT, ()))
    half = -audio[..., moved : moved + (audio.shape[-1] - SHIFT) // 1920 * 960]
    audio = audio[..., :-SHIFT]
    out, (_, spectral, codes, latents, commitment) = forward(model.dac, audio, keep, bfloat16)
    envelope, notes = model.errors(spectral, audio)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        z = model.dac.encoder(half)
    same = ignorance(model.dac, z.float(), codes[:, :SPECTRAL, : z.shape[-1]], use)
    losses = {
        "mel": loss_of(out, audio),
        "wave": (wave_error(out, audio) * keep / n).mean(),
        "envelope": envelope,
        "notes": notes,
        "same": same,
        "commit": commitment,
    }
    weights = {"mel": 1.0, "wave": WAVE, "commit": COMMITMENT}
    weights |= {"envelope": SPECTRUM, "notes": NOTES, "same": SAME}
    sum(weights[k] * v for k, v in losses.items()).backward()
    return codes, latents.detach(), {k: v.item() for k, v in losses.items()}


def wave_error(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """[B] energy of the error over that of `y`, treble lifted; 1 is what silence gets."""
    x, y = (a[..., 1:] - 0.8 * a[..., :-1] for a in (x, y))
    return (x - y).square().mean((1, 2)) / (y.square().mean((1, 2)) + 1e-6)


@torch.no_grad()
def validate(dac: nn.Module, ema: dict, excerpts: torch.Tensor, distance: MelDistance) -> float:
    """Mel distance of the averaged weights on fixed excerpts, in float32."""
    kept = {k: v.clone() for k, v in dac.state_dict().items()}
    dac.load_state_dict(ema)
    every = torch.full((1,), CONFIG["n_codebooks"])
    values = [distance(x, forward(dac, x, every, False)[0]).item() for x in excerpts.split(1)]
    dac.load_state_dict(kept)
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
    parser.add_argument("--init", type=Path, help="checkpoint.pt of another run to begin from")
    parser.add_argument("--minutes", type=float, default=60, help="training time, all runs")
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2, help="threads; divides the batch")
    parser.add_argument("--seconds", type=float, default=0.64, help="length of an excerpt")
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
    snake.use_in_dac()
    torch.manual_seed(a.seed)
    model = Trained(dac.DAC(**CONFIG))
    scale_layers(model.dac, train.draw(np.random.default_rng(0), 96, 15_360, 4.0))
    books = Codebooks(model.dac)
    if a.init:
        state = torch.load(a.init, weights_only=True)
        model.load_state_dict(state["model"])
        model.dac.load_state_dict(state["ema"])
        books.uses, books.sums = state["uses"], state["sums"]
        books.centre(model.dac, SPECTRAL)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=a.learning_rate, betas=(0.8, 0.99), weight_decay=0.01)
    ema = {k: v.clone() for k, v in model.dac.state_dict().items()}
    # Threads that each run whole layers on their part of the batch: on a machine shared with
    # others this loses far less than splitting every operation between the cores.
    replicas = [model, *(Trained(dac.DAC(**CONFIG)) for _ in range(a.workers - 1))]
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
    parameters = sum(p.numel() for p in model.dac.parameters())
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
    sums: Counter[str] = Counter()
    samples = int(a.seconds * SAMPLE_RATE) // 960 * 960 + SHIFT
    while progress() < 1:
        started = time.monotonic()
        rng = np.random.default_rng((a.seed, step))
        torch.manual_seed(a.seed * 1_000_003 + step)
        rate = a.learning_rate * min(1, (step + 1) / 50) * (1 + math.cos(math.pi * progress())) / 2
        for group in optimizer.param_groups:
            group["lr"] = max(rate, 1e-6)
        audio = train.draw(rng, a.batch, samples, 4.0).chunk(a.workers)
        use = books.log_shares(SPECTRAL)
        work = functools.partial(backward, use=use, loss_of=loss_of, bfloat16=not a.float32)
        results = list(pool.map(work, replicas, audio))
        codes, latents = (torch.cat([r[i] for r in results]) for i in (0, 1))
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
            for key, value in model.dac.state_dict().items():
                ema[key].lerp_(value, 1 - decay)
        books.update(codes, latents)
        if (step == 9 or step % 25 == 24) and progress() < 0.7:
            sums["reseeded"] += books.reseed(torch.Generator().manual_seed(step))
        sums["norm"] += float(norm) / 50
        for _, _, losses in results:
            for name, value in losses.items():
                sums[name] += value / len(results) / 50
        step += 1
        spent += time.monotonic() - started
        if step % 50 == 0:
            means = " ".join(f"{name} {sums[name]:.3f}" for name in sorted(sums))
            perplexity = " ".join(f"{p:.0f}" for p in books.perplexity())
            rest = f"lr {rate:.1e} perplexity {perplexity}"
            print(f"step {step} minute {spent / 60:.1f} {means} {rest}", flush=True)
            sums.clear()
        if spent - saved > 60 * a.save_every:
            checkpoint_now()
            saved = spent
        if spent - validated > 60 * a.validate_every:
            value = validate(model.dac, ema, held, distance)
            print(f"step {step} validation mel distance {value:.4f}", flush=True)
            validated = spent
    checkpoint_now()
    export(ema, a.out)
    print(
        f"finished: validation mel distance {validate(model.dac, ema, held, distance):.4f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
