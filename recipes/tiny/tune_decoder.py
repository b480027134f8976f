"""Train the codec's decoder further on what the models generate; no token changes.

Half of the excerpts are decoded from their own tokens, with the losses of train_codec.py. The
other half are decoded from their true coarse tokens and generated fine ones (generate_fine.py),
which do not agree on the phase: only magnitudes are asked for there. So the decoder learns to make
the notes that the coarse tokens tell out of fine tokens that fit badly.
"""

import argparse
import json
import math
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import nn
from train_codec import (
    CONFIG,
    SCALES,
    WAVE,
    Excerpts,
    MelDistance,
    Notes,
    Snake,
    export,
    save,
    validate,
    wave_error,
)

from codec_bridge.descript import import_dac

HOP = math.prod(CONFIG["encoder_rates"])
MARGIN = 6
"""Frames at both ends of an excerpt that only give context."""
NOTES = 4.0
"""Weight of the notes' error in what is decoded from generated tokens."""


class Pairs(Excerpts):
    """Excerpts that begin with a frame, and the generated tokens of the same frames."""

    def __init__(self, music: Path, names: list[str], generated: Path):
        super().__init__(music, [n for n in names if (generated / f"{n}.npy").exists()])
        self.tokens = [np.load(generated / f"{n}.npy", mmap_mode="r") for n in self.names]

    def pair(self, rng: np.random.Generator, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Audio [1, 1, frames · HOP] and tokens [1, C, frames]."""
        while True:
            i = rng.choice(len(self.files), p=self.weights)
            start = int(rng.integers(0, max(1, self.tokens[i].shape[1] - frames)))
            audio, _ = soundfile.read(
                self.files[i], frames * HOP, start * HOP, dtype="float32", fill_value=0
            )
            if np.abs(audio).max() > 1e-3:
                break
        audio = audio * min(self.gains[i], 1 / float(np.abs(audio).max()))
        tokens = self.tokens[i][:, start : start + frames].astype(np.int64)
        return torch.from_numpy(audio)[None, None], torch.from_numpy(tokens)[None]


def backward(decoder, latents, audio, generated, mel, notes, bfloat16):
    """Set the decoder's gradients for one excerpt → its losses by name."""
    torch.set_num_threads(1)
    decoder.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        out = decoder(latents)
    inside = slice(MARGIN * HOP, -MARGIN * HOP)
    out, audio = out.float()[..., inside], audio[..., inside]
    losses = {"mel": mel(out, audio)}
    if generated:
        wrong = (notes(out.squeeze(1)) - notes(audio.squeeze(1))).abs().mean()
        losses["notes"] = NOTES * wrong
    else:
        losses["wave"] = WAVE * wave_error(out, audio).mean()
    sum(losses.values()).backward()
    side = "generated" if generated else "own"
    return {f"{side} {name}": value.item() for name, value in losses.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("data/music"))
    parser.add_argument("--split", type=Path, default=Path(__file__).parent / "split.json")
    parser.add_argument("--generated", type=Path, default=Path("data/generated"))
    parser.add_argument("--codec", type=Path, default=Path("runs/codec/checkpoint.pt"))
    parser.add_argument("--out", type=Path, default=Path("runs/decoder"))
    parser.add_argument("--minutes", type=float, default=40, help="training time, all runs")
    parser.add_argument("--frames", type=int, default=32, help="of an excerpt, without margins")
    parser.add_argument("--learning-rate", type=float, default=2.5e-4)
    parser.add_argument("--float32", action="store_true", help="no bfloat16 convolutions")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    split = json.loads(a.split.read_text())
    pairs = Pairs(a.data, split["train"], a.generated)
    held = Excerpts(a.data, split["validation"]).draw(np.random.default_rng(1), 12, 96_000, 0)
    dac = import_dac()
    sys.modules["dac.nn.layers"].Snake1d.forward = lambda self, x: Snake.apply(x, self.alpha)
    model = dac.DAC(**CONFIG)
    model.load_state_dict(torch.load(a.codec, weights_only=True)["ema"])
    model.requires_grad_(False)
    decoder = model.decoder.requires_grad_(True)
    trained = list(decoder.parameters())
    optimizer = torch.optim.AdamW(trained, lr=a.learning_rate, betas=(0.8, 0.99))
    ema = {k: v.clone() for k, v in model.state_dict().items()}
    step, spent = 0, 0.0
    a.out.mkdir(parents=True, exist_ok=True)
    checkpoint = a.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema, step, spent = state["ema"], state["step"], state["spent"]
    replica = dac.DAC(**CONFIG).decoder
    for parameter, own in zip(replica.parameters(), trained, strict=True):
        parameter.data = own.data
    mel, notes = MelDistance(SCALES), Notes(8192, HOP)
    distance = MelDistance([(2048, 150), (512, 80)])
    pool = ThreadPoolExecutor(2)

    def checkpoint_now() -> None:
        state = {"model": model.state_dict(), "ema": ema, "optimizer": optimizer.state_dict()}
        save(checkpoint, state | {"step": step, "spent": spent, "config": CONFIG})

    def one(decoder: nn.Module, generated: bool, pair: tuple) -> dict[str, float]:
        audio, tokens = pair
        with torch.no_grad():
            if not generated:
                tokens = model.encode(audio)[1]
            latents = model.quantizer.from_codes(tokens)[0]
        return backward(decoder, latents, audio, generated, mel, notes, not a.float32)

    saved, sums = spent, Counter()
    while spent < 60 * a.minutes:
        started = time.monotonic()
        rng = np.random.default_rng((a.seed, step))
        share = spent / (60 * a.minutes)
        rate = a.learning_rate * min(1, (step + 1) / 50) * (1 + math.cos(math.pi * share)) / 2
        for group in optimizer.param_groups:
            group["lr"] = max(rate, 1e-6)
        excerpts = [pairs.pair(rng, a.frames + 2 * MARGIN) for _ in range(2)]
        results = pool.map(one, (decoder, replica), (False, True), excerpts)
        for losses in results:
            for name, value in losses.items():
                sums[name] += value / 50
        for parameter, other in zip(trained, replica.parameters(), strict=True):
            parameter.grad = (parameter.grad + other.grad) / 2
        norm = nn.utils.clip_grad_norm_(trained, 20.0)
        if torch.isfinite(norm):
            optimizer.step()
        decay = min(0.998, (1 + step) / (20 + step))
        with torch.no_grad():
            for key, value in model.state_dict().items():
                ema[key].lerp_(value, 1 - decay)
        step += 1
        spent += time.monotonic() - started
        if step % 50 == 0:
            means = " ".join(f"{name} {sums[name]:.3f}" for name in sorted(sums))
            print(f"step {step} minute {spent / 60:.1f} {means} lr {rate:.1e}", flush=True)
            sums.clear()
        if spent - saved > 300:
            checkpoint_now()
            saved = spent
    checkpoint_now()
    export(ema, a.out)
    print(f"finished: validation mel distance {validate(model, ema, held, distance):.4f}")


if __name__ == "__main__":
    main()
