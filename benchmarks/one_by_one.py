"""What each idea behind the sampler's speed gives, one by one: alternately with and without it.

    python -m benchmarks.one_by_one                 # tiny's stages on 10 s, batch 1
    python -m benchmarks.one_by_one --batch 8 --rounds 9

Every row is one idea; its ratio is the time without it over the time with it in the same round.
Both ways draw from the same distribution, except for order spread. The rows about windows are of
eight, whatever --batch says.
"""

import argparse
import concurrent.futures
import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import vampnet_jax as vampnet
from benchmarks.against_torch import alternate
from vampnet_jax import SamplingOptions, model, sampling, vamping
from vampnet_jax.drawing import draw, inverse_cdf
from vampnet_jax.filters import typical_keep
from vampnet_jax.release import Stage
from vampnet_jax.unmasking import least_confident

Pair = tuple[str, Callable[[], Any], Callable[[], Any]]
"""What, with it, without it."""
MASS, MIN_TOKENS = 0.15, 64


def sorted_keep(logits: jax.Array) -> jax.Array:
    """`typical_keep` by sorting the vocabulary."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    p = jnp.exp(log_p)
    entropy = -jnp.sum(p * log_p, axis=-1, keepdims=True)
    order = jnp.argsort(jnp.abs(-log_p - entropy), axis=-1)
    held = jnp.cumsum(jnp.take_along_axis(p, order, axis=-1), axis=-1)
    needed = jnp.maximum(jnp.sum(held < MASS, axis=-1, keepdims=True) + 1, MIN_TOKENS)
    return jnp.argsort(order, axis=-1) < needed


def folded_embedding(params: model.Params, tokens: jax.Array) -> jax.Array:
    """The embedding with codebooks and projection multiplied beforehand."""
    table = params["folded"]  # [C, V+1, D]
    rows = jax.vmap(lambda rows, ids: rows[ids], in_axes=(0, 1))(table, tokens)
    return jnp.sum(rows, axis=0) + params["embedding"]["bias"][None, None]


def plain_embedding(params: model.Params, tokens: jax.Array) -> jax.Array:
    """The embedding as the model computes it."""
    e = params["embedding"]
    table = jnp.concatenate([e["codebooks"], e["mask"][:, None]], axis=1)
    rows = jax.vmap(lambda rows, ids: rows[ids], in_axes=(0, 1), out_axes=1)(table, tokens)
    return jnp.einsum("BCTd,CdD->BTD", rows, e["kernel"]) + e["bias"][None, None]


def sorted_least_confident(confidence: jax.Array, masked: jax.Array, count: jax.Array) -> jax.Array:
    """`unmasking.least_confident` by sorting the positions."""
    flat = jnp.where(masked, confidence, jnp.inf).reshape(len(count), -1)
    rank = jnp.argsort(jnp.argsort(flat, axis=-1, stable=True), axis=-1)
    return (rank < count[:, None]).reshape(masked.shape) & masked


def argmax_draw(logits: jax.Array, u: jax.Array, greedy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Token and log probability of `draw`, as one writes them first."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    token = jnp.where(greedy, jnp.argmax(log_p, axis=-1), inverse_cdf(jnp.exp(log_p), u))
    return token, jnp.take_along_axis(log_p, token[..., None], axis=-1)[..., 0]


def ready(function: Callable, *arguments: Any, **options: Any) -> Callable[[], Any]:
    """A call of a compiled function that waits for its result."""
    return lambda: jax.block_until_ready(function(*arguments, **options))


def drawing_ideas(rows: int, vocabulary: int) -> Iterator[Pair]:
    """On logits as wide as one step of the coarse model has them."""
    key = jax.random.key(0)
    logits = 2 * jax.random.normal(key, (rows, vocabulary))
    yield (
        "typical filter: threshold bisected, not sorted",
        ready(jax.jit(lambda x: typical_keep(x, MASS, MIN_TOKENS)), logits),
        ready(jax.jit(sorted_keep), logits),
    )

    def by_inverse(logits: jax.Array, key: jax.Array) -> jax.Array:
        u = jax.random.uniform(key, logits.shape[:-1])
        return inverse_cdf(jax.nn.softmax(logits, axis=-1), u)

    yield (
        "draw: one uniform through the inverse CDF, not V Gumbel draws",
        ready(jax.jit(by_inverse), logits, key),
        ready(jax.jit(lambda x, k: jax.random.categorical(k, x)), logits, key),
    )

    u, greedy = jax.random.uniform(key, (rows,)), jnp.asarray(False)
    yield (
        "draw: first of the highest logits by comparing, not argmax of log_softmax",
        ready(jax.jit(lambda *x: draw(*x)[:2]), logits, u, greedy),
        ready(jax.jit(argmax_draw), logits, u, greedy),
    )
    confidence = jax.random.normal(key, (1, rows, 1))
    masked, count = jnp.ones(confidence.shape, bool), jnp.array([rows // 2])
    yield (
        "what stays masked: threshold bisected, not sorted",
        ready(jax.jit(least_confident), confidence, masked, count),
        ready(jax.jit(sorted_least_confident), confidence, masked, count),
    )


def network_ideas(stage: Stage, tokens: jax.Array) -> Iterator[Pair]:
    """On one pass of the transformer."""
    params, config = stage
    e = params["embedding"]
    table = jnp.concatenate([e["codebooks"], e["mask"][:, None]], axis=1)
    folded = {**params, "folded": jnp.einsum("CVd,CdD->CVD", table, e["kernel"])}
    yield (
        "embedding: codebooks times projection, multiplied once (not kept)",
        ready(jax.jit(folded_embedding), folded, tokens),
        ready(jax.jit(plain_embedding), params, tokens),
    )
    forward = jax.jit(functools.partial(model.frame_major_logits, config=config))
    bias = model.position_bias(params, tokens.shape[-1], config)
    yield (
        "one pass: position bias looked up beforehand",
        ready(forward, params, tokens, bias=bias),
        ready(forward, params, tokens),
    )


def loop_ideas(stage: Stage, tokens: jax.Array, steps: int) -> Iterator[Pair]:
    """On all steps of one stage."""
    params, config = stage
    keys = jax.random.split(jax.random.key(0), len(tokens))
    n_frames = jnp.int32(tokens.shape[-1])
    mask = vampnet.masks.periodic(tokens.shape, 7)

    def run(segments: int, options: SamplingOptions, donate: tuple[int, ...] = ()) -> Callable:
        values = sampling.traced(options)
        raw = functools.partial(sampling.decode, config=config, options=values, segments=segments)
        program = jax.jit(raw, donate_argnums=donate)
        compiled = program.lower(params, tokens, mask, keys, n_frames).compile()
        host = np.asarray(tokens), np.asarray(mask)
        return lambda: jax.block_until_ready(
            compiled(params, jnp.asarray(host[0]), jnp.asarray(host[1]), keys, n_frames)
        )

    options = SamplingOptions(steps=steps)
    plain = run(1, options)
    for segments in sorted({2, sampling.SEGMENTS, 6}):
        if segments <= steps:
            yield (f"{steps} steps in {segments} segments, not one", run(segments, options), plain)
    yield (
        f"{steps} steps: order spread, not confidence (other tokens)",
        run(1, SamplingOptions(steps=steps, order="spread")),
        plain,
    )
    yield f"{steps} steps: donated buffers (not kept)", run(1, options, (1, 2)), plain


def window_ideas(stage: Stage, window: int, batch: int, steps: int, passes: list) -> Iterator[Pair]:
    """On windows that could be decoded together."""
    config = stage.config
    n_frames = max(start for group in passes for start in group) + window
    shape = (batch, config.n_codebooks, n_frames)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape, np.int32)
    mask = np.ones(shape, bool)
    mask[:, : config.n_conditioning_codebooks] = False
    keys = jax.random.split(jax.random.key(0), batch)

    def run(rows: int) -> Callable[[], Any]:
        def once() -> None:
            with mock.patch.object(vamping, "rows_at_once", return_value=rows):
                vamping.fill(
                    stage, tokens.copy(), mask, keys, SamplingOptions(steps=steps), passes,
                    window, lambda count: None,
                )  # fmt: skip

        return once

    together = batch * max(map(len, passes))
    for rows in (1, 2, 4):
        if rows < together:
            yield (
                f"{together} windows of {window} frames, {config.n_predicted_codebooks} codebooks, "
                f"{steps} steps: {rows} at once, not {together}",
                run(rows),
                run(together),
            )


def overlap_ideas(tiny: vampnet.Model) -> Iterator[Pair]:
    """On two clips of 10 s: the codec works on one while the other is generated."""
    codec = tiny.codec
    samples = 0.1 * np.random.default_rng(0).standard_normal((1, 10 * codec.sample_rate))
    audio = samples.astype(np.float32)
    tokens = np.asarray(codec.encode(audio))
    mask = vampnet.masks.periodic(tokens.shape, 7)

    def code() -> None:
        codec.encode(audio)
        codec.decode(tokens)

    def generate() -> None:
        jax.block_until_ready(vampnet.vamp(tiny, tokens, mask, jax.random.key(0)))

    def beside() -> None:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            coding = pool.submit(code)
            generate()
            coding.result()

    def after() -> None:
        code()
        generate()

    yield "encode and decode of one clip beside generation of another (not kept)", beside, after


def main(argv: Sequence[str] | None = None) -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(argv)
    tiny = vampnet.load("tiny")
    stage = tiny.coarse
    shape = (args.batch, stage.config.n_codebooks, tiny.coarse_window)
    tokens = jax.random.randint(jax.random.key(0), shape, 0, stage.config.vocab_size)
    fine = tiny.fine
    fine_shape = (args.batch * 3, fine.config.n_codebooks, tiny.fine_window)
    fine_tokens = jax.random.randint(jax.random.key(0), fine_shape, 0, fine.config.vocab_size)
    pairs = [
        *drawing_ideas(tokens.size, stage.config.vocab_size),
        *network_ideas(stage, tokens),
        *loop_ideas(stage, tokens, 24),
        *loop_ideas(fine, fine_tokens, 2),
        *window_ideas(stage, tiny.coarse_window, 8, 4, [[0]]),
        *window_ideas(fine, tiny.fine_window, 8, 2, [[0]]),
        *overlap_ideas(tiny),
    ]
    print(f"batch {args.batch}, {args.rounds} rounds\n")
    print("| idea | with, ms | without, ms | times as fast |\n|---|---|---|---|")
    for what, with_it, without in pairs:
        seconds = alternate({"with": with_it, "without": without}, args.rounds)
        ratios = [b / a for a, b in zip(seconds["with"], seconds["without"], strict=True)]
        with_ms, without_ms = (1e3 * statistics.median(seconds[k]) for k in ("with", "without"))
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        row = f"{with_ms:.1f} | {without_ms:.1f} | {middle:.2f} ({low:.2f} to {high:.2f})"
        print(f"| {what} | {row} |", flush=True)


if __name__ == "__main__":
    main()
