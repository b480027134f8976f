"""Train the whole codec further with the losses of its decoder's tuning: its tokens change.

train_codec.py makes tokens, tune_decoder.py what is heard of them; here the encoder learns which
tokens the tuned decoder makes most of. Three excerpts in four are decoded from what the encoder
tells, of the variants of tracks as well (augment_music.py) and at random gains; the others as in
tune_decoder.py, from variations and jumbled, in half of which tokens do not go together within a
frame either. The first codebooks also answer for being the same when the music is moved and turned
upside down (`--same`), for a language model's sake. Afterwards the music is tokenised anew, the
models get the new codes (adopt_codec.py), and both are trained on with `train.py --init-from`.
"""

import argparse
import functools
import json
import math
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import snake
import torch
from torch import nn
from train_codec import (
    COMMITMENT,
    CONFIG,
    SHIFT,
    SPECTRAL,
    Codebooks,
    Excerpts,
    MelDistance,
    export,
    ignorance,
    quantise,
    save,
    validate,
)
from tune_decoder import HOP, MARGIN, Excerpt, Losses, Pairs, jumble, read_codec

from codec_bridge.descript import import_dac

DROPOUT = 0.15
"""How often an excerpt is decoded from its first codebooks only (quantiser dropout)."""

GAINS = 3.0
"""Standard deviation in dB of the gains of excerpts."""


class Result(NamedTuple):
    """Of one excerpt: the losses by name and, if it was encoded, what the codebooks are fed."""

    losses: dict[str, float]
    codes: torch.Tensor | None  # [1, C, frames]
    latents: torch.Tensor | None  # [1, C · d, frames]


@torch.no_grad()
def unfit(dac: nn.Module, side: str, excerpt: Excerpt, rng: np.random.Generator) -> Excerpt:
    """The excerpt of a variation, or jumbled, with tokens of the codec as it is now."""
    if side == "varied":
        tokens = dac.quantizer(dac.encoder(excerpt.audio))[1]
        kept = excerpt.kept.bool()[None, None]
        return excerpt._replace(tokens=torch.where(kept, tokens, excerpt.tokens))
    excerpt = jumble(dac, excerpt, rng)
    if rng.random() < 0.5:  # tokens that do not go together within a frame either
        first = int(rng.integers(SPECTRAL, CONFIG["n_codebooks"]))
        excerpt.tokens[:, first:] = jumble(dac, excerpt, rng).tokens[:, first:]
    return excerpt


def backward(
    dac: nn.Module,
    side: str,
    excerpt: Excerpt,
    seed: tuple[int, ...],
    losses_of: Losses,
    same: float,
    use: torch.Tensor,
    bfloat16: bool,
) -> Result:
    """Set the gradients of the codec for one excerpt: "own", "varied" or "jumbled"."""
    torch.set_num_threads(1)
    dac.zero_grad(set_to_none=True)
    rng = np.random.default_rng(seed)
    losses, codes, latents, equal = {}, None, None, {}
    autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=bfloat16)
    if side == "own":
        with autocast():
            z = dac.encoder(excerpt.audio)
        keep = CONFIG["n_codebooks"]
        if rng.random() < DROPOUT:
            keep = int(rng.integers(SPECTRAL, keep))
        total, _, codes, latents, losses["commit"] = quantise(
            dac, z.float(), torch.tensor([keep]), apart=False
        )
        latents = latents.detach()
        if same:
            moved = int(rng.integers(1, SHIFT))
            other = -excerpt.audio[..., moved : moved + excerpt.audio.shape[-1] - SHIFT]
            with autocast():
                z = dac.encoder(other)
            first = codes[:, :SPECTRAL, : z.shape[-1]]
            losses["same"] = ignorance(dac, z.float(), first, use)
            with torch.no_grad():
                again = dac.quantizer(z.float())[1][:, :SPECTRAL]
            equal = {"equal": (again == first).float().mean().item()}
    else:
        excerpt = unfit(dac, side, excerpt, rng)
        with torch.no_grad():
            total = dac.quantizer.from_codes(excerpt.tokens)[0]
    with autocast():
        out = dac.decoder(total)
    inside = slice(MARGIN * HOP, -MARGIN * HOP)
    kept = excerpt.kept.repeat_interleave(HOP)[inside]
    losses |= losses_of(out.float()[..., inside], excerpt.audio[..., inside], kept)
    weights = losses_of.weights | {"commit": COMMITMENT, "same": same}
    sum(weights[name] * value for name, value in losses.items()).backward()
    return Result({name: value.item() for name, value in losses.items()} | equal, codes, latents)


def count(dac: nn.Module, books: Codebooks, music: Excerpts, frames: int, n: int = 100) -> None:
    """Begin the running means of codes, per excerpt of `frames`, with how often `n` use them."""
    rng = np.random.default_rng(0)
    with torch.no_grad():
        drawn = (music.draw(rng, 1, 100 * HOP, GAINS) for _ in range(n))
        codes = [dac.quantizer(dac.encoder(audio))[1] for audio in drawn]
    for uses, tokens in zip(books.uses, torch.cat(codes, 2)[0], strict=True):
        uses += torch.bincount(tokens, minlength=len(uses)) / len(tokens)
    books.uses = frames * books.uses + 0.002  # none is never used
    books.sums = torch.stack(books.codes) * books.uses[..., None]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--music", type=Path, default=Path("data/music"))
    parser.add_argument("--split", type=Path, default=Path(__file__).parent / "split.json")
    parser.add_argument("--tokens", type=Path, default=Path("data/tokens"))
    parser.add_argument("--variations", type=Path, default=Path("data/variations"))
    parser.add_argument("--codec", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/tuned"))
    parser.add_argument("--minutes", type=float, default=60, help="training time, all runs")
    parser.add_argument("--frames", type=int, default=24, help="of an excerpt, without margins")
    parser.add_argument("--learning-rate", type=float, default=2.5e-4)
    parser.add_argument("--wave", type=float, default=0.3, help="weight of the waveform error")
    parser.add_argument("--notes", type=float, default=3.0, help="weight of the notes' error")
    parser.add_argument(
        "--buzz", type=float, default=0.5, help="weight of treble that repeats with the frames"
    )
    parser.add_argument(
        "--same", type=float, default=0.1, help="weight of the first codebooks' dependence on phase"
    )
    parser.add_argument("--float32", action="store_true", help="no bfloat16 convolutions")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    split = json.loads(a.split.read_text())
    pairs = Pairs(a.music, a.tokens, a.variations)
    music = Excerpts(a.music, split["train"])
    held = Excerpts(a.music, split["validation"]).draw(np.random.default_rng(1), 12, 96_000, 0)
    dac = import_dac()
    snake.use_in_dac()
    model = dac.DAC(**CONFIG)
    model.load_state_dict(read_codec(a.codec))
    books = Codebooks(model, decay=0.999)
    trained = [p for p in model.parameters() if p.requires_grad]
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
        books.uses, books.sums = state["uses"], state["sums"]
    else:
        count(model, books, music, a.frames + 2 * MARGIN)
    replica = dac.DAC(**CONFIG)
    for parameter, own in zip(replica.parameters(), model.parameters(), strict=True):
        parameter.data = own.data
        parameter.requires_grad_(own.requires_grad)
    others = [p for p in replica.parameters() if p.requires_grad]
    losses_of = Losses(a.notes, a.wave, a.buzz, 0)
    distance = MelDistance([(2048, 150), (512, 80)])
    pool = ThreadPoolExecutor(2)

    def draw(rng: np.random.Generator, side: str) -> Excerpt:
        frames = a.frames + 2 * MARGIN
        if side == "varied":
            return pairs.draw(rng, frames, True)
        audio = music.draw(rng, 1, frames * HOP, GAINS)
        tokens = torch.zeros(1, CONFIG["n_codebooks"], frames, dtype=torch.long)  # made anew
        return Excerpt(audio, tokens, torch.ones(frames))

    def checkpoint_now() -> None:
        state = {"model": model.state_dict(), "ema": ema, "optimizer": optimizer.state_dict()}
        state |= {"uses": books.uses, "sums": books.sums}
        save(checkpoint, state | {"step": step, "spent": spent, "config": CONFIG})

    saved, sums, counts = spent, Counter[str](), Counter[str]()
    while spent < 60 * a.minutes:
        started = time.monotonic()
        rng = np.random.default_rng((a.seed, step))
        done = spent / (60 * a.minutes)
        rate = a.learning_rate * min(1, (step + 1) / 50) * (1 + math.cos(math.pi * done)) / 2
        for group in optimizer.param_groups:
            group["lr"] = max(rate, 1e-6)
        sides = ("own", ("varied", "own", "jumbled", "own")[step % 4])
        excerpts = [draw(rng, side) for side in sides]
        seeds = [(a.seed, step, i) for i in range(2)]
        use = books.log_shares(SPECTRAL)
        options = {"losses_of": losses_of, "same": a.same, "use": use, "bfloat16": not a.float32}
        work = functools.partial(backward, **options)
        results = list(pool.map(work, (model, replica), sides, excerpts, seeds))
        for side, result in zip(sides, results, strict=True):
            for name, value in result.losses.items():
                sums[f"{side} {name}"] += value
                counts[f"{side} {name}"] += 1
        for parameter, other in zip(trained, others, strict=True):
            found = [p.grad for p in (parameter, other) if p.grad is not None]
            parameter.grad = sum(found) / 2 if found else None
        norm = nn.utils.clip_grad_norm_(trained, 20.0)
        if torch.isfinite(norm):
            optimizer.step()
            for result in results:
                if result.codes is not None and result.latents is not None:
                    books.update(result.codes, result.latents)
        decay = min(0.998, (1 + step) / (20 + step))
        with torch.no_grad():
            for key, value in model.state_dict().items():
                ema[key].lerp_(value, 1 - decay)
        step += 1
        spent += time.monotonic() - started
        sums["norm"] += float(norm)
        counts["norm"] += 1
        if step % 50 == 0:
            means = " ".join(f"{name} {sums[name] / counts[name]:.3f}" for name in sorted(sums))
            perplexity = " ".join(f"{p:.0f}" for p in books.perplexity())
            rest = f"lr {rate:.1e} perplexity {perplexity}"
            print(f"step {step} minute {spent / 60:.1f} {means} {rest}", flush=True)
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
