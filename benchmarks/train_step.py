"""One training step in JAX against plain PyTorch, on the same weights and data, alternately.

    python -m benchmarks.train_step
    python -m benchmarks.train_step --batch 8 --dtype bfloat16-products

The model is that of tiny's coarse stage, the step that of `train.py --preset tiny`: tokens masked
at random, cross-entropy with label smoothing over the masked tokens, AdamW after clipping. PyTorch
runs benchmarks/torch_vampnet.py with its own fused AdamW, eager and by torch.compile; what JAX does
besides (moving average, accuracies) counts as its own time. With another dtype than float32 JAX
runs in both, and PyTorch with its autocast to bfloat16.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F

import vampnet_jax as vampnet
from benchmarks import torch_vampnet
from benchmarks.against_torch import alternate, ratios, show
from vampnet_jax.config import Dtype
from vampnet_jax.training.config import TrainConfig, preset_config
from vampnet_jax.training.objective import draw_masks, mask_ratios
from vampnet_jax.training.step import TrainState, init_state, jitted_step, with_codebooks

N_CODEBOOKS, VOCAB, LATENT = 8, 1024, 8


def tiny_config(**changes: object) -> TrainConfig:
    """The preset's settings with the dimensions of the model in the box, without dropout.

    Two libraries cannot draw the same dropout.
    """
    dimensions = vampnet.load("tiny").coarse.config
    shape = {"n_layers": dimensions.n_layers, "n_heads": dimensions.n_heads}
    shape["embedding_dim"] = dimensions.embedding_dim
    return preset_config(
        "tiny", "coarse", {"steps": 1000, "seed": 0, "dropout": 0.0, **shape, **changes},
        codec_codebooks=N_CODEBOOKS, codebook_size=VOCAB, latent_dim=LATENT,
    )  # fmt: skip


class TorchStep:
    """Training of the yardstick: the same objective and optimiser at the peak learning rate."""

    def __init__(self, state: TrainState, config: TrainConfig, *, compiled: bool) -> None:
        params = vampnet_params(state)
        self.config = config
        self.model = torch_vampnet.from_params(params, config.model).train().requires_grad_(True)
        others = [p for name, p in self.model.named_parameters() if name != "tables"]
        # Decay would change the codec's vectors, which share a table with those of MASK.
        groups = [{"params": others}, {"params": [self.model.tables], "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=config.learning_rate, betas=(config.adam_b1, config.adam_b2), eps=1e-8,
            weight_decay=config.weight_decay, fused=True,
        )  # fmt: skip
        self._loss = torch.compile(self.loss, dynamic=False) if compiled else self.loss

    def loss(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Mean over the masked tokens of [B, C, T]."""
        hidden = tokens.masked_fill(mask, self.config.model.mask_token)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.model.dtype != "float32"):
            logits = self.model(hidden, self.model.position_bias(tokens.shape[-1])).float()
        losses = F.cross_entropy(
            logits.flatten(0, 2), tokens.transpose(1, 2).flatten(), reduction="none",
            label_smoothing=self.config.label_smoothing,
        )  # fmt: skip
        scored = mask.transpose(1, 2).flatten()
        return (losses * scored).sum() / scored.sum()

    def gradient_step(self, tokens: torch.Tensor, mask: torch.Tensor) -> float:
        """Take one step; the loss before it."""
        loss = self._loss(tokens, mask)
        loss.backward()
        codec_rows = self.model.tables.grad.unflatten(0, (-1, self.config.model.vocab_size + 1))
        codec_rows[:, :-1] = 0  # the codec's vectors are not trained
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


def vampnet_params(state: TrainState) -> dict:
    """The state's parameters as `vampnet_jax.apply` takes them."""
    return with_codebooks(state.params, state.codebooks)


def mask_of_step(config: TrainConfig, step: int, n_frames: int) -> np.ndarray:
    """The mask that `train_step` draws, bool [B, C, T]."""
    batch = config.batch_size
    numbers = jnp.arange(batch, dtype=jnp.uint32)
    ratios = mask_ratios(jnp.asarray(np.uint32(config.seed)), np.uint32(step * batch) + numbers)
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.split(key)[0]))(numbers)
    return np.asarray(draw_masks(keys, ratios, n_frames, config.model))


def contestants(config: TrainConfig, n_frames: int, n_steps: int) -> dict[str, Callable[[], float]]:
    """The step in JAX, PyTorch and compiled PyTorch; each call takes one and returns its loss.

    PyTorch is given the masks of `n_steps` steps, which JAX draws in the step.
    """
    model = config.model
    rng = np.random.default_rng(0)
    shape = (model.n_codebooks, model.vocab_size, model.latent_dim)
    codebooks = rng.standard_normal(shape).astype(np.float32)
    start = jax.jit(init_state, static_argnums=0)(config, codebooks)
    size = (config.batch_size, model.n_codebooks, n_frames)
    tokens = rng.integers(0, model.vocab_size, size, np.int32)
    ids = torch.from_numpy(tokens.astype(np.int64))
    masks = [
        torch.from_numpy(mask_of_step(config, step, n_frames).copy()) for step in range(n_steps)
    ]

    def steps_in_torch(*, compiled: bool) -> Callable[[], float]:
        side, left = TorchStep(start, config, compiled=compiled), iter(masks)
        return lambda: side.gradient_step(ids, next(left))

    sides = {
        "step eager": steps_in_torch(compiled=False),
        "step compiled": steps_in_torch(compiled=True),
    }
    batch, done = jnp.asarray(tokens), jnp.float32(0)

    def steps_in_jax(dtype: str) -> Callable[[], float]:
        computing = dataclasses.replace(model, dtype=dtype)
        step = jitted_step(dataclasses.replace(config, model=computing))
        state = jax.tree.map(jnp.copy, start)  # a step uses up the state before it

        def take_one() -> float:
            nonlocal state
            state, metrics = step(state, batch, done)
            return float(metrics["loss"])

        return take_one

    ours = {"step jax": steps_in_jax(model.dtype)}
    if model.dtype != "float32":
        ours["step jax float32"] = steps_in_jax("float32")
    return {**ours, **sides}


def main(argv: Sequence[str] | None = None) -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--dtype", choices=get_args(Dtype), default="float32")
    args = parser.parse_args(argv)
    config = tiny_config(batch_size=args.batch, dtype=args.dtype)
    codec = vampnet.load("tiny").codec
    n_frames = round(config.window_seconds * codec.frame_rate)
    seconds = alternate(contestants(config, n_frames, args.rounds + 2), args.rounds)
    result = {"seconds": seconds, "times as fast as": ratios(seconds, ("step",))}
    show(f"tiny coarse, one training step, batch {args.batch} × {n_frames} frames", result)


if __name__ == "__main__":
    main()
