"""Train the codec's decoder further on its own tokens and on variations; no token changes.

Half of the excerpts are decoded from the tokens of the music, a quarter from variations of it
(vary_training_tracks.py), whose gaps hold what the models made: tokens that do not agree on the
phase. Of gaps only magnitudes are asked for, so the decoder learns to make the most likely
spectrum out of tokens that fit badly, as in use. The last quarter is jumbled: every frame has the
tokens of the music moved by up to half a frame or turned upside down. The right notes in the wrong
phases cancel out, and the decoder learns to make them as loud as they should be. The waveform
counts less than in train_codec.py: what phase the tokens carry is settled, and mel distance
suffers from it.
descript-audio-codec's discriminator judges what is decoded (adversary.py).
"""

import argparse
import json
import math
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.signal
import snake
import soundfile
import torch
from adversary import decoder_losses, discriminator, discriminator_loss
from cache_music import VARIANT
from safetensors.torch import load_file
from torch import nn
from train_codec import (
    CONFIG,
    SAMPLE_RATE,
    SCALES,
    Excerpts,
    MelDistance,
    Notes,
    export,
    save,
    track_weights,
    validate,
)

from codec_bridge.descript import import_dac
from codec_bridge.pth import weight_norm
from vampnet_jax.training.excerpts import choose_tracks
from vampnet_jax.training.tokens import TrackReader, read_manifest

HOP = math.prod(CONFIG["encoder_rates"])
MARGIN = 6
"""Frames at both ends of an excerpt that only give context."""


class Excerpt(NamedTuple):
    """Music, its tokens or a variation's, and which frames have all the music's tokens."""

    audio: torch.Tensor  # [1, 1, frames · HOP]
    tokens: torch.Tensor  # [1, C, frames]
    kept: torch.Tensor  # [frames], 0 or 1


class Pairs:
    """The training tracks but their variants: audio as it was tokenised, tokens, variations."""

    def __init__(self, music: Path, tokens: Path, variations: Path):
        manifest = read_manifest(tokens)
        originals = [t for t in choose_tracks(manifest, "train") if VARIANT not in t.name]
        self.reader = TrackReader(tokens, manifest, originals)
        self.tracks = self.reader.tracks
        self.files = [music / f"{track.name}.wav" for track in self.tracks]
        index = json.loads((music / "index.json").read_text())
        self.gains = []
        for track, file in zip(self.tracks, self.files, strict=True):
            peak = max(
                float(np.abs(part).max()) for part in soundfile.blocks(file, 1 << 20, fill_value=0)
            )
            self.gains.append(min(10 ** ((-24 - index[track.name]["loudness"]) / 20), 1 / peak))
        self.varied = [np.load(variations / f"{t.name}.npy", mmap_mode="r") for t in self.tracks]
        self.weights = track_weights(
            [track.source for track in self.tracks], [track.seconds for track in self.tracks]
        )

    def draw(self, rng: np.random.Generator, frames: int, varied: bool) -> Excerpt:
        """A random excerpt that is not silent."""
        while True:
            i = int(rng.choice(len(self.tracks), p=self.weights))
            last = self.tracks[i].frames - frames - 1
            if last < 0:
                continue
            start = int(rng.integers(0, last))
            audio, _ = soundfile.read(
                self.files[i], frames * HOP, start * HOP, dtype="float32", fill_value=0
            )
            if np.abs(audio[MARGIN * HOP : -MARGIN * HOP]).max() > 1e-3:
                break
        own = np.asarray(self.reader.read(i, start, start + frames)[0]).astype(np.int64)
        tokens = own
        if varied:
            tokens = np.asarray(self.varied[i][:, start : start + frames]).astype(np.int64)
        kept = (tokens == own).all(axis=0).astype(np.float32)
        audio = torch.from_numpy(audio * self.gains[i])[None, None]
        return Excerpt(audio, torch.from_numpy(tokens)[None], torch.from_numpy(kept))


@torch.no_grad()
def jumble(model: nn.Module, excerpt: Excerpt, rng: np.random.Generator) -> Excerpt:
    """Give every frame the tokens of the music moved by up to half a frame, of either polarity."""
    moved = [
        torch.roll(excerpt.audio, int(rng.integers(-HOP // 2, HOP // 2)), -1) * sign
        for sign in (1, -1, 1, -1)
    ]
    tokens = model.quantizer(model.encoder(torch.cat(moved)))[1]  # [4, C, frames]
    which = torch.from_numpy(rng.integers(0, len(moved), tokens.shape[-1]))
    chosen = tokens[which, :, torch.arange(len(which))].T[None]  # [1, C, frames]
    return Excerpt(excerpt.audio, chosen, torch.zeros_like(excerpt.kept))


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


def wave_error(x: torch.Tensor, y: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Energy of the error over that of `y`, treble lifted, of samples where `kept` is 1."""
    x, y = (a[..., 1:] - 0.8 * a[..., :-1] for a in (x, y))
    kept = kept[1:]
    energy = (y.square() * kept).sum() + 1e-6 * kept.sum() + 1e-6
    return ((x - y).square() * kept).sum() / energy


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

    def likeness(self, x: torch.Tensor) -> torch.Tensor:
        """[4] correlations of both bands of [1, 1, samples] with themselves."""
        bands = nn.functional.conv1d(x, self.filters)[0]
        pairs = ((bands[:, lag:], bands[:, :-lag]) for lag in (HOP, 2 * HOP))
        return torch.cat([nn.functional.cosine_similarity(*p, dim=1, eps=SILENT) for p in pairs])

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (self.likeness(x) - self.likeness(y)).abs().mean()


class Losses(nn.Module):
    """What a decoded excerpt is compared by, by name, and `weights` of these and the judge's."""

    def __init__(self, notes: float, wave: float, buzz: float, adversarial: float):
        super().__init__()
        self.weights = {"mel": 1.0, "notes": notes, "wave": wave, "buzz": buzz}
        self.weights |= {"verdict": adversarial, "features": 2 * adversarial}
        self.mel, self.notes, self.buzz = MelDistance(SCALES), Notes(8192, HOP), Buzz()

    def forward(
        self, out: torch.Tensor, audio: torch.Tensor, kept: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Of [1, 1, samples] and the music; `kept` [samples] is 1 where the phase is known."""
        notes = (self.notes(out.squeeze(1)) - self.notes(audio.squeeze(1))).abs().mean()
        losses = {"mel": self.mel(out, audio), "notes": notes}
        return losses | {"wave": wave_error(out, audio, kept), "buzz": self.buzz(out, audio)}


def backward(
    decoder: nn.Module,
    latents: torch.Tensor,
    excerpt: Excerpt,
    losses_of: Losses,
    judge: nn.Module | None,
    judge_learns: bool,
    bfloat16: bool,
) -> dict[str, float]:
    """Set the gradients of the decoder, and of a judge that learns, for one excerpt → losses."""
    torch.set_num_threads(1)
    decoder.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        out = decoder(latents)
    inside = slice(MARGIN * HOP, -MARGIN * HOP)
    out, audio = out.float()[..., inside], excerpt.audio[..., inside]
    kept = excerpt.kept.repeat_interleave(HOP)[inside]
    losses = losses_of(out, audio, kept)
    if judge is not None:
        judge.requires_grad_(False)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            losses["verdict"], losses["features"] = decoder_losses(judge, out, audio)
    sum(losses_of.weights[name] * value for name, value in losses.items()).backward()
    if judge is not None and judge_learns:
        judge.requires_grad_(True).zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            losses["judge"] = discriminator_loss(judge, out, audio)
        losses["judge"].backward()
    return {name: value.item() for name, value in losses.items()}


def share(replica: nn.Module, module: nn.Module) -> nn.Module:
    """Let `replica` have the parameters of `module`, with gradients of its own."""
    for parameter, own in zip(replica.parameters(), module.parameters(), strict=True):
        parameter.data = own.data
    return replica


def update(
    optimizer: torch.optim.Optimizer, trained: list[nn.Parameter], others: list[nn.Parameter]
) -> None:
    """One step along the mean of two replicas' gradients, unless they are not finite."""
    for parameter, other in zip(trained, others, strict=True):
        parameter.grad = (parameter.grad + other.grad) / 2
    if torch.isfinite(nn.utils.clip_grad_norm_(trained, 20.0)):
        optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--music", type=Path, default=Path("data/music"))
    parser.add_argument("--split", type=Path, default=Path(__file__).parent / "split.json")
    parser.add_argument("--tokens", type=Path, default=Path("data/tokens"))
    parser.add_argument("--variations", type=Path, default=Path("data/variations"))
    parser.add_argument(
        "--codec",
        type=Path,
        default=Path("runs/codec/checkpoint.pt"),
        help="checkpoint.pt, codec.pth of blend_decoders.py, or a model's codec.safetensors",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/decoder"))
    parser.add_argument("--minutes", type=float, default=60, help="training time, all runs")
    parser.add_argument("--frames", type=int, default=24, help="of an excerpt, without margins")
    parser.add_argument("--learning-rate", type=float, default=2.5e-4)
    parser.add_argument("--wave", type=float, default=0.3, help="weight of the waveform error")
    parser.add_argument("--notes", type=float, default=3.0, help="weight of the notes' error")
    parser.add_argument(
        "--buzz",
        type=float,
        default=0.5,
        help="weight of what is above 600 Hz being the same in every frame",
    )
    parser.add_argument(
        "--adversarial",
        type=float,
        default=0.03,
        help="weight of the discriminator's verdict (0: none); its features count twice as much",
    )
    parser.add_argument("--float32", action="store_true", help="no bfloat16 convolutions")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    split = json.loads(a.split.read_text())
    pairs = Pairs(a.music, a.tokens, a.variations)
    held = Excerpts(a.music, split["validation"]).draw(np.random.default_rng(1), 12, 96_000, 0)
    dac = import_dac()
    snake.use_in_dac()
    model = dac.DAC(**CONFIG)
    model.load_state_dict(read_codec(a.codec))
    model.requires_grad_(False)
    decoder = model.decoder.requires_grad_(True)
    trained = list(decoder.parameters())
    optimizer = torch.optim.AdamW(trained, lr=a.learning_rate, betas=(0.8, 0.99))
    ema = {k: v.clone() for k, v in model.state_dict().items()}
    step, spent = 0, 0.0
    a.out.mkdir(parents=True, exist_ok=True)
    checkpoint = a.out / "checkpoint.pt"
    state = torch.load(checkpoint, weights_only=True) if checkpoint.exists() else {}
    if "judge" in state and not a.adversarial:
        sys.exit(f"{a.out} was begun with a discriminator; resume it with --adversarial above 0")
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema, step, spent = state["ema"], state["step"], state["spent"]
    replica = share(dac.DAC(**CONFIG).decoder, decoder)
    judges: list[nn.Module] = []
    if a.adversarial:
        judges = [discriminator(SAMPLE_RATE) for _ in range(2)]
        share(judges[1], judges[0])
        judging = list(judges[0].parameters())
        judge_optimizer = torch.optim.AdamW(judging, lr=2e-4, betas=(0.8, 0.99))
        if "judge" in state:  # otherwise it joins a run that began without
            judges[0].load_state_dict(state["judge"])
            judge_optimizer.load_state_dict(state["judge_optimizer"])
    losses_of = Losses(a.notes, a.wave, a.buzz, a.adversarial)
    distance = MelDistance([(2048, 150), (512, 80)])
    pool = ThreadPoolExecutor(2)

    def checkpoint_now() -> None:
        state = {"model": model.state_dict(), "ema": ema, "optimizer": optimizer.state_dict()}
        if judges:
            state["judge"] = judges[0].state_dict()
            state["judge_optimizer"] = judge_optimizer.state_dict()
        save(checkpoint, state | {"step": step, "spent": spent, "config": CONFIG})

    def one(decoder: nn.Module, excerpt: Excerpt, judge: nn.Module | None) -> dict[str, float]:
        with torch.no_grad():
            latents = model.quantizer.from_codes(excerpt.tokens)[0]
        learns = step % 2 == 0  # it is quicker to learn than the decoder
        return backward(decoder, latents, excerpt, losses_of, judge, learns, not a.float32)

    saved, sums, counts = spent, Counter[str](), Counter[str]()
    while spent < 60 * a.minutes:
        started = time.monotonic()
        rng = np.random.default_rng((a.seed, step))
        done = spent / (60 * a.minutes)
        rate = a.learning_rate * min(1, (step + 1) / 50) * (1 + math.cos(math.pi * done)) / 2
        for group in optimizer.param_groups:
            group["lr"] = max(rate, 1e-6)
        sides = ("own", "varied" if step % 4 < 2 else "jumbled")  # the judge learns at even steps
        excerpts = [pairs.draw(rng, a.frames + 2 * MARGIN, side == "varied") for side in sides]
        if sides[1] == "jumbled":
            excerpts[1] = jumble(model, excerpts[1], rng)
        results = pool.map(one, (decoder, replica), excerpts, judges or (None, None))
        for side, losses in zip(sides, results, strict=True):
            for name, value in losses.items():
                sums[f"{side} {name}"] += value
                counts[f"{side} {name}"] += 1
        update(optimizer, trained, list(replica.parameters()))
        if judges and step % 2 == 0:
            update(judge_optimizer, judging, list(judges[1].parameters()))
        decay = min(0.998, (1 + step) / (20 + step))
        with torch.no_grad():
            for key, value in model.state_dict().items():
                ema[key].lerp_(value, 1 - decay)
        step += 1
        spent += time.monotonic() - started
        if step % 50 == 0:
            means = " ".join(f"{name} {sums[name] / counts[name]:.3f}" for name in sorted(sums))
            print(f"step {step} minute {spent / 60:.1f} {means} lr {rate:.1e}", flush=True)
            sums.clear()
            counts.clear()
        if step % 500 == 0:
            value = validate(model, ema, held, distance)
            print(f"step {step} validation mel distance {value:.4f}", flush=True)
        if spent - saved > 180:
            checkpoint_now()
            saved = spent
    checkpoint_now()
    export(ema, a.out)
    print(f"finished: validation mel distance {validate(model, ema, held, distance):.4f}")


if __name__ == "__main__":
    main()
