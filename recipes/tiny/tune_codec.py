"""Train the whole codec further with the losses of its decoder's tuning: its tokens change.

train_codec.py makes tokens, tune_decoder.py what is heard of them; here the encoder learns which
tokens the tuned decoder makes most of. Three excerpts in four are decoded from what the encoder
tells, of the variants of tracks as well (augment_music.py) and at random gains; the others as in
tune_decoder.py, from variations and jumbled, in half of which tokens do not go together within a
frame either. The first codebooks also answer for being the same when the music is moved and turned
upside down (`--same`), for a language model's sake. Afterwards the music is tokenised anew, the
models get the new codes (adopt_codec.py), and both are trained on with `train.py --init-from`.
"""

import functools
import json
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from codec_data import MARGIN, Excerpt, Excerpts, Pairs, jumble, validation_excerpts
from codec_loop import Run, fingerprint, generators, share, trained, update
from codec_losses import Losses, swapped_prediction
from codec_model import (
    CONFIG,
    HOP,
    SPECTRAL,
    EMACodebooks,
    build,
    codebooks,
    fit_codes,
    perplexity,
    quantise,
    read_codec,
)
from torch import nn
from train_codec import COMMITMENT
from tune_decoder import tuning_options

DROPOUT = 0.15
"""How often an excerpt is decoded from its first codebooks only (quantiser dropout)."""

GAINS = 3.0
"""Standard deviation in dB of the gains of excerpts."""
FIT_EXCERPTS = 2000
"""Excerpts that the codes are fitted to."""


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
    rng: np.random.Generator,
    losses_of: Losses,
    same: float,
    use: torch.Tensor,
    bfloat16: bool,
) -> Result:
    """Set the gradients of the codec for one excerpt: "own", "varied" or "jumbled"."""
    torch.set_num_threads(1)
    dac.zero_grad(set_to_none=True)
    losses, codes, latents, equal = {}, None, None, {}
    autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=bfloat16)
    if side == "own":
        with autocast():
            z = dac.encoder(excerpt.audio)
        keep = CONFIG["n_codebooks"]
        if rng.random() < DROPOUT:
            keep = int(rng.integers(SPECTRAL, keep))
        quantised = quantise(dac, z.float(), torch.tensor([keep]), apart=False)
        z_q, codes, latents = quantised.z_q, quantised.codes, quantised.latents.detach()
        losses["commit"] = quantised.commitment
        if same:
            moved = int(rng.integers(1, HOP))
            other = -excerpt.audio[..., moved : moved + excerpt.audio.shape[-1] - HOP]
            with autocast():
                z = dac.encoder(other)
            first = codes[:, :SPECTRAL, : z.shape[-1]]
            losses["same"] = swapped_prediction(dac, z.float(), first, use)
            with torch.no_grad():
                again = dac.quantizer(z.float())[1][:, :SPECTRAL]
            equal = {"equal": (again == first).float().mean().item()}
    else:
        excerpt = unfit(dac, side, excerpt, rng)
        with torch.no_grad():
            z_q = dac.quantizer.from_codes(excerpt.tokens)[0]
    with autocast():
        out = dac.decoder(z_q)
    inside = slice(MARGIN * HOP, -MARGIN * HOP)
    kept = excerpt.kept.repeat_interleave(HOP)[inside]
    losses |= losses_of(out.float()[..., inside], excerpt.audio[..., inside], kept)
    weights = losses_of.weights | {"commit": COMMITMENT, "same": same}
    sum(weights[name] * value for name, value in losses.items()).backward()
    return Result({name: value.item() for name, value in losses.items()} | equal, codes, latents)


@torch.no_grad()
def fit(dac: nn.Module, books: EMACodebooks, music: Excerpts, frames: int) -> None:
    """Fit the codes to music, and begin their running means with that, per excerpt of `frames`.

    Prints the perplexity of the first codebooks on that music, before and after.
    """
    rng = np.random.default_rng(0)
    drawn = (music.draw(rng, 1, frames * HOP, GAINS) for _ in range(FIT_EXCERPTS))
    z = torch.cat([dac.encoder(audio)[0].T for audio in drawn])
    before, counts = fit_codes(dac, z, 0), fit_codes(dac, z)
    books.uses = frames * counts / counts.sum(1, keepdim=True) + 0.002  # none is never used
    books.sums = torch.stack(books.codes) * books.uses[..., None]
    pairs = zip(perplexity(before), perplexity(counts), strict=True)
    changes = ", ".join(f"{old:.0f} → {new:.0f}" for old, new in islice(pairs, SPECTRAL))
    print(f"codes fitted; perplexity of the first: {changes}", flush=True)


def main() -> None:
    parser = tuning_options(__doc__, "runs/decoder/codec.safetensors", "runs/tuned")
    parser.add_argument(
        "--same",
        type=float,
        default=0.03,
        help="weight of the first codebooks' dependence on phase",
    )
    a = parser.parse_args()
    frames = a.frames + 2 * MARGIN
    split = json.loads(a.split.read_text())
    music = Excerpts(a.music, split["train"])
    held = validation_excerpts(a.music, split)
    model = build()
    codec = read_codec(a.codec)
    model.load_state_dict(codec)
    pairs = Pairs(a.music, a.tokens, a.variations, codebooks(model), frames)
    books = EMACodebooks(model, decay=0.998)
    optimizer = torch.optim.AdamW(trained(model), lr=a.learning_rate, betas=(0.8, 0.99))
    run = Run(
        a.out,
        model,
        optimizer,
        held,
        lambda: {"model": model.state_dict()} | books.state(),
        minutes=a.minutes,
        learning_rate=a.learning_rate,
        begun_from=fingerprint(codec),
    )
    if state := run.resume():
        model.load_state_dict(state["model"])
        books.load(state)
    else:
        fit(model, books, music, frames)
    replicas = [model, share(build(), model)]
    losses_of = Losses(a.notes, a.wave, a.buzz, 0)
    pool = ThreadPoolExecutor(2)

    def draw(rng: np.random.Generator, side: str) -> Excerpt:
        if side == "varied":
            return pairs.draw(rng, True)
        audio = music.draw(rng, 1, frames * HOP, GAINS)
        tokens = torch.zeros(1, CONFIG["n_codebooks"], frames, dtype=torch.long)  # made anew
        return Excerpt(audio, tokens, torch.ones(frames))

    for step in run.steps():
        rngs = generators(a.seed, step, 2)
        sides = ("own", ("varied", "own", "jumbled", "own")[step % 4])
        excerpts = [draw(rng, side) for rng, side in zip(rngs, sides, strict=True)]
        options = {"losses_of": losses_of, "same": a.same, "bfloat16": not a.float32}
        work = functools.partial(backward, use=books.log_shares(SPECTRAL), **options)
        results = list(pool.map(work, replicas, sides, excerpts, rngs))
        norm, finite = update(optimizer, replicas)
        run.note("norm", norm)
        for side, result in zip(sides, results, strict=True):
            if finite and result.codes is not None and result.latents is not None:
                books.update(result.codes, result.latents)
            for name, value in result.losses.items():
                run.note(f"{side} {name}", value)
        run.note("perplexity", books.perplexity().mean().item())


if __name__ == "__main__":
    main()
