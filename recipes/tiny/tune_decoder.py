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
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from adversary import decoder_losses, discriminator_loss, new_discriminator
from codec_data import MARGIN, Excerpt, Pairs, jumble, validation_excerpts
from codec_loop import Run, fingerprint, generators, share, update
from codec_losses import Losses
from codec_model import HOP, SAMPLE_RATE, build, codebooks, read_codec
from torch import nn


def tuning_options(doc: str, codec: str, out: str) -> argparse.ArgumentParser:
    """Those of this script and of tune_codec.py; `doc` is the script's docstring."""
    parser = argparse.ArgumentParser(
        description=doc.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--music", type=Path, default=Path("data/music"))
    parser.add_argument("--split", type=Path, default=Path(__file__).parent / "split.json")
    parser.add_argument("--tokens", type=Path, default=Path("data/tokens"))
    parser.add_argument("--variations", type=Path, default=Path("data/variations"))
    parser.add_argument(
        "--codec",
        type=Path,
        default=Path(codec),
        help="checkpoint.pt, codec.pth of blend_decoders.py, or a model's codec.safetensors",
    )
    parser.add_argument("--out", type=Path, default=Path(out))
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
    parser.add_argument("--float32", action="store_true", help="no bfloat16 convolutions")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def backward(
    decoder: nn.Module,
    z_q: torch.Tensor,
    excerpt: Excerpt,
    losses_of: Losses,
    discriminator: nn.Module | None,
    learns: bool,
    bfloat16: bool,
) -> dict[str, float]:
    """Set the gradients of the decoder, and of a discriminator if it `learns`, for one excerpt."""
    torch.set_num_threads(1)
    decoder.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        out = decoder(z_q)
    inside = slice(MARGIN * HOP, -MARGIN * HOP)
    out, audio = out.float()[..., inside], excerpt.audio[..., inside]
    kept = excerpt.kept.repeat_interleave(HOP)[inside]
    losses = losses_of(out, audio, kept)
    if discriminator is not None:
        discriminator.requires_grad_(False)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            losses["adversarial"], losses["feature_matching"] = decoder_losses(
                discriminator, out, audio
            )
    sum(losses_of.weights[name] * value for name, value in losses.items()).backward()
    if discriminator is not None and learns:
        discriminator.requires_grad_(True).zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            losses["discriminator"] = discriminator_loss(discriminator, out, audio)
        losses["discriminator"].backward()
    return {name: value.item() for name, value in losses.items()}


def main() -> None:
    parser = tuning_options(__doc__, "runs/codec/checkpoint.pt", "runs/decoder")
    parser.add_argument(
        "--adversarial",
        type=float,
        default=0.03,
        help="weight of the discriminator's verdict (0: none); its features count twice as much",
    )
    a = parser.parse_args()
    split = json.loads(a.split.read_text())
    held = validation_excerpts(a.music, split)
    model = build()
    codec = read_codec(a.codec)
    model.load_state_dict(codec)
    pairs = Pairs(a.music, a.tokens, a.variations, codebooks(model), a.frames + 2 * MARGIN)
    model.requires_grad_(False)
    decoder = model.decoder.requires_grad_(True)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=a.learning_rate, betas=(0.8, 0.99))
    discriminators: list[nn.Module] = []
    if a.adversarial:
        torch.manual_seed(a.seed)
        discriminators = [new_discriminator(SAMPLE_RATE) for _ in range(2)]
        share(discriminators[1], discriminators[0])
        learning = torch.optim.AdamW(discriminators[0].parameters(), lr=2e-4, betas=(0.8, 0.99))

    def state() -> dict:
        content = {"model": model.state_dict()}
        if discriminators:
            content["discriminator"] = discriminators[0].state_dict()
            content["discriminator_optimizer"] = learning.state_dict()
        return content

    run = Run(
        a.out,
        model,
        optimizer,
        held,
        state,
        minutes=a.minutes,
        learning_rate=a.learning_rate,
        begun_from=fingerprint(codec),
    )
    resumed = run.resume()
    if "discriminator" in resumed and not a.adversarial:
        sys.exit(f"{a.out} was begun with a discriminator; resume it with --adversarial above 0")
    if resumed:
        model.load_state_dict(resumed["model"])
    if "discriminator" in resumed:  # otherwise it joins a run that began without
        discriminators[0].load_state_dict(resumed["discriminator"])
        learning.load_state_dict(resumed["discriminator_optimizer"])
    decoders = [decoder, share(build().decoder, decoder)]
    losses_of = Losses(a.notes, a.wave, a.buzz, a.adversarial)
    pool = ThreadPoolExecutor(2)
    for step in run.steps():
        learns = step % 2 == 0  # it is quicker to learn than the decoder
        rngs = generators(a.seed, step, 2)
        sides = ("own", "varied" if step % 4 < 2 else "jumbled")
        excerpts = [pairs.draw(r, s == "varied") for r, s in zip(rngs, sides, strict=True)]
        if sides[1] == "jumbled":
            excerpts[1] = jumble(model, excerpts[1], rngs[1])

        def one(
            decoder: nn.Module,
            excerpt: Excerpt,
            discriminator: nn.Module | None,
            learns: bool = learns,
        ) -> dict[str, float]:
            with torch.no_grad():
                z_q = model.quantizer.from_codes(excerpt.tokens)[0]
            return backward(decoder, z_q, excerpt, losses_of, discriminator, learns, not a.float32)

        results = list(pool.map(one, decoders, excerpts, discriminators or (None, None)))
        for side, losses in zip(sides, results, strict=True):
            for name, value in losses.items():
                run.note(f"{side} {name}", value)
        run.note("norm", update(optimizer, decoders)[0])
        if discriminators and learns:
            update(learning, discriminators)


if __name__ == "__main__":
    main()
