"""JAX against plain PyTorch on the same weights, alternately in one run.

    python -m benchmarks.against_torch                     # both parts
    python -m benchmarks.against_torch --part official     # published coarse size, random weights
    python -m benchmarks.against_torch --part tiny --batch 1 8

`official` times the transformer alone and 8 steps of sampling on 1×575 frames; `tiny` times the
model in the box on 10 s of audio, 24 coarse and 2 fine steps over the windows of `vamp`. The other
side is benchmarks/torch_vampnet.py, eager and by torch.compile. Every round runs all of them once,
in turning order, and measures what matrix products of the model's shapes reach in JAX and in
PyTorch; ratios are of the same round. Medians are printed with their extremes, and everything is
written as JSON with -o FILE.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import vampnet_jax as vampnet
from benchmarks import torch_vampnet
from codec_bridge.atomic import atomic_write
from vampnet_jax import ModelConfig, SamplingOptions, vamping
from vampnet_jax.benchmarking.flops import MatmulRate, forward_flops
from vampnet_jax.benchmarking.measuring import spread
from vampnet_jax.cli.results import environment
from vampnet_jax.model import frame_major_logits, position_bias

OFFICIAL = ModelConfig(n_codebooks=4, dropout=0.0)
OFFICIAL_FRAMES = 575
OFFICIAL_STEPS = 8
TINY_SECONDS = 10
TINY_OPTIONS = {"coarse": SamplingOptions(steps=24), "fine": SamplingOptions(steps=2)}

Contestants = Mapping[str, Callable[[], Any]]


class TorchMatmulRate:
    """The products of a `MatmulRate` in PyTorch, weights laid out as in a Linear layer."""

    def __init__(self, config: ModelConfig, rows: int, like: MatmulRate) -> None:
        width = config.embedding_dim
        self.flops, self._times = like.flops, like.times
        self._x = torch.ones(rows, width)
        self._pairs = [
            (
                torch.randn(4 * width, width) * width**-0.5,
                torch.randn(width, 4 * width) * width**-0.5,
            )
            for _ in range(like.n_pairs)
        ]

    @torch.inference_mode()
    def __call__(self) -> float:
        """Measure once, FLOP/s."""
        x, start = self._x, time.perf_counter()
        for _ in range(self._times):
            for up, down in self._pairs:
                x = torch.nn.functional.linear(torch.nn.functional.linear(x, up), down)
        return self.flops / (time.perf_counter() - start)


def alternate(contestants: Contestants, rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant in each round, after two runs that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(2):
        for run in contestants.values():
            run()
    for index in range(rounds):
        names = list(contestants)
        for name in names if index % 2 == 0 else names[::-1]:
            start = time.perf_counter()
            contestants[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def torch_sides(
    model: torch_vampnet.TorchVampNet, options: SamplingOptions
) -> dict[str, torch_vampnet.Sampler]:
    """The yardstick's sampler, eager and compiled."""
    eager = torch_vampnet.Sampler(model, options)
    compiled = torch_vampnet.Sampler(model, options)
    compiled.compile_step()
    return {"eager": eager, "compiled": compiled}


def official(rounds: int, config: ModelConfig = OFFICIAL, frames: int = OFFICIAL_FRAMES) -> dict:
    """The transformer alone, and some steps, of the published coarse size."""
    rng = np.random.default_rng(0)
    shape = (config.n_codebooks, config.vocab_size, config.latent_dim)
    codebooks = rng.standard_normal(shape).astype(np.float32)
    params = jax.jit(vampnet.init, static_argnums=1)(jax.random.key(0), config, codebooks)
    model = torch_vampnet.from_params(params, config)
    options = SamplingOptions(steps=OFFICIAL_STEPS)
    tokens = rng.integers(0, config.vocab_size, (1, config.n_codebooks, frames), np.int32)
    mask = np.ones(tokens.shape, bool)
    rows = jnp.asarray(tokens)
    bias = jax.jit(functools.partial(position_bias, n_frames=frames, config=config))(params)
    forward = jax.jit(functools.partial(frame_major_logits, config=config))
    ids, torch_bias = torch.from_numpy(tokens.astype(np.int64)), model.position_bias(frames)
    compiled_model = torch.compile(model, dynamic=False)

    def jax_forward() -> None:
        jax.block_until_ready(forward(params, rows, bias=bias))

    def jax_steps() -> None:
        jax.block_until_ready(
            vampnet.generate(params, rows, jnp.asarray(mask), jax.random.key(0), config, options)
        )

    def torch_steps(sampler: torch_vampnet.Sampler) -> None:
        sampler(ids, torch.from_numpy(mask), torch.Generator().manual_seed(0))

    def torch_forward(model: Callable[..., torch.Tensor]) -> None:
        with torch.inference_mode():
            model(ids, torch_bias)

    jax_rate = MatmulRate(config, frames)
    rates = {"jax": jax_rate, "torch": TorchMatmulRate(config, frames, jax_rate)}
    measured: dict[str, list[float]] = {name: [] for name in rates}

    def rate(name: str) -> None:
        measured[name].append(rates[name]())

    contestants: dict[str, Callable[[], None]] = {
        "rate jax": functools.partial(rate, "jax"),
        "rate torch": functools.partial(rate, "torch"),
        "forward jax": jax_forward,
        "forward eager": functools.partial(torch_forward, model),
        "forward compiled": functools.partial(torch_forward, compiled_model),
        "steps jax": jax_steps,
    }
    for name, sampler in torch_sides(model, options).items():
        contestants[f"steps {name}"] = functools.partial(torch_steps, sampler)
    seconds = alternate(contestants, rounds)
    counted = {name: values[-rounds:] for name, values in measured.items()}
    flops = forward_flops(config, frames)
    shares = {
        f"forward {side}, share of {of}'s matmul rate": [
            flops / s / r for s, r in zip(seconds[f"forward {side}"], counted[of], strict=True)
        ]
        for side, of in (("jax", "jax"), ("eager", "torch"), ("compiled", "torch"))
    }
    outside = [
        1 - OFFICIAL_STEPS * inner / whole
        for inner, whole in zip(seconds["forward jax"], seconds["steps jax"], strict=True)
    ]
    return {
        "seconds": {k: v for k, v in seconds.items() if not k.startswith("rate")},
        "matmul FLOP/s": counted,
        "times as fast as": ratios(seconds, ("forward", "steps")),
        "shares": shares | {"steps jax, share outside the transformer": outside},
    }


def torch_vamp(
    samplers: Mapping[str, torch_vampnet.Sampler],
    windows: Mapping[str, int],
    tokens: np.ndarray,
    mask: np.ndarray,
) -> np.ndarray:
    """The windows of `vampnet_jax.vamp`, each batch of them decoded by the yardstick.

    Args:
      samplers: by stage, coarse and fine.
      windows: frames that each reads at once.
      tokens, mask: `[B, C, T]`.
    """
    filled, masked = tokens.astype(np.int64), mask.copy()
    n_frames = tokens.shape[-1]
    generator = torch.Generator().manual_seed(0)
    for name, sampler in samplers.items():
        window, n = windows[name], sampler.model.config.n_codebooks
        starts = vamping.window_starts(n_frames, window)
        passes = [[s] for s in starts] if name == "coarse" else vamping.independent(starts, window)
        for group in passes:
            spans = [slice(s, s + window) for s in group]
            rows = np.concatenate([filled[:, :n, span] for span in spans])
            hidden = np.concatenate([masked[:, :n, span] for span in spans])
            made = sampler(torch.from_numpy(rows), torch.from_numpy(hidden), generator).numpy()
            for span, part in zip(spans, np.split(made, len(spans)), strict=True):
                filled[:, :n, span] = part
                masked[:, :n, span] = False
    return filled


def tiny(rounds: int, batch: int, model: vampnet.Model | None = None) -> dict:
    """The model in the box, from tokens to tokens."""
    model = vampnet.load("tiny") if model is None else model
    rng = np.random.default_rng(0)
    n_codebooks = model.fine.config.n_codebooks
    shape = (batch, n_codebooks, round(TINY_SECONDS * model.codec.frame_rate))
    tokens = rng.integers(0, model.codec.codebook_size, shape, np.int32)
    mask = np.array(vampnet.masks.periodic(shape, 7))
    windows = {"coarse": model.coarse_window, "fine": model.fine_window}
    sides: dict[str, dict[str, torch_vampnet.Sampler]] = {"eager": {}, "compiled": {}}
    for name, stage in (("coarse", model.coarse), ("fine", model.fine)):
        network = torch_vampnet.from_params(stage.params, stage.config)
        for side, sampler in torch_sides(network, TINY_OPTIONS[name]).items():
            sides[side][name] = sampler
    contestants: dict[str, Callable[[], Any]] = {
        "vamp jax": lambda: vampnet.vamp(model, tokens, mask, jax.random.key(0), **TINY_OPTIONS)
    }
    for side, samplers in sides.items():
        contestants[f"vamp {side}"] = functools.partial(torch_vamp, samplers, windows, tokens, mask)
    seconds = alternate(contestants, rounds)
    return {"seconds": seconds, "times as fast as": ratios(seconds, ("vamp",))}


def ratios(seconds: Mapping[str, Sequence[float]], works: Sequence[str]) -> dict[str, list[float]]:
    """How many times as fast JAX is as each side of PyTorch, by round."""
    return {
        f"{work} {side}": [
            theirs / ours
            for ours, theirs in zip(seconds[f"{work} jax"], seconds[f"{work} {side}"], strict=True)
        ]
        for work in works
        for side in ("eager", "compiled")
    }


def show(title: str, result: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Print medians and extremes."""
    print(f"\n{title}")
    for kind, rows in result.items():
        print(f"  {kind}")
        for name, values in rows.items():
            scale = 1e9 if kind == "matmul FLOP/s" else 1.0
            middle, least, most = (f(values) / scale for f in (statistics.median, min, max))
            unit = " GFLOP/s" if scale != 1.0 else ""
            print(f"    {name:<50} {middle:9.3f}  ({least:.3f} to {most:.3f}){unit}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("official", "tiny"), help="only one of the two")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="of tiny")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, help="write everything as JSON")
    args = parser.parse_args(argv)
    results: dict[str, dict] = {}
    print(
        f"{torch.get_num_threads()} threads of PyTorch {torch.__version__}, JAX {jax.__version__}"
    )
    if args.part != "tiny":
        name = f"official coarse, 1 × {OFFICIAL_FRAMES} frames, {OFFICIAL_STEPS} steps, float32"
        results[name] = official(args.rounds)
        show(name, results[name])
    if args.part != "official":
        for batch in args.batch:
            name = f"tiny, {TINY_SECONDS} s, 24+2 steps, batch {batch}, float32"
            results[name] = tiny(args.rounds, batch)
            show(name, results[name])
    if args.output is not None:
        content = {
            name: {
                kind: {row: spread(values) for row, values in rows.items()}
                for kind, rows in result.items()
            }
            for name, result in results.items()
        }
        with atomic_write(args.output) as path:
            path.write_text(json.dumps({"environment": environment()} | content, indent=2) + "\n")


if __name__ == "__main__":
    main()
