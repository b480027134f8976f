"""VampNet's transformer and sampler in plain PyTorch: an oracle for tests, a yardstick of speed.

Written from the paper, not from this library's code: fused projections, PyTorch's own attention
with the bias as its mask, filters by sorting, one uniform number per token. Nothing loops over
what PyTorch has an operation for, and `torch.compile` takes a step whole.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vampnet_jax import ModelConfig, SamplingOptions


class Block(nn.Module):
    """Pre-norm attention and gated feed-forward."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.Parameter(torch.ones(width))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.feed_forward_norm = nn.Parameter(torch.ones(width))
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x [B, T, D], bias [1, H, T, T]."""
        y = F.rms_norm(x, x.shape[-1:], self.attention_norm, 1e-6)
        q, k, v = self.qkv(y).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        a, b = self.up(F.rms_norm(x, x.shape[-1:], self.feed_forward_norm, 1e-6)).chunk(2, dim=-1)
        return x + self.down(a * F.gelu(b, approximate="tanh"))


class TorchVampNet(nn.Module):
    """Tokens [B, C, T] → logits [B, T, Cp, V]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        n, width = config.n_codebooks, config.embedding_dim
        self.tables = nn.Parameter(torch.zeros(n * (config.vocab_size + 1), config.latent_dim))
        self.project = nn.Linear(n * config.latent_dim, width)
        self.position_table = nn.Parameter(torch.zeros(32, config.n_heads))
        self.blocks = nn.ModuleList(Block(width, config.n_heads) for _ in range(config.n_layers))
        self.norm = nn.Parameter(torch.ones(width))
        self.head = nn.Linear(width, config.n_predicted_codebooks * config.vocab_size)
        self.register_buffer("first_rows", torch.arange(n) * (config.vocab_size + 1))

    def position_bias(self, n_frames: int) -> Tensor:
        """T5's relative bias, [1, H, query, key]."""
        frames = torch.arange(n_frames, device=self.position_table.device)
        offset = frames - frames[:, None]  # key − query
        distance = offset.abs()
        far = 8 + (torch.log(distance.clamp(min=8) / 8) / math.log(128 / 8) * 8).long()
        bucket = torch.where(distance < 8, distance, far.clamp(max=15)) + 16 * (offset > 0)
        return self.position_table[bucket].permute(2, 0, 1)[None].contiguous()

    def forward(self, tokens: Tensor, bias: Tensor) -> Tensor:
        rows = tokens.transpose(1, 2) + self.first_rows  # [B, T, C]
        x = self.project(F.embedding(rows, self.tables).flatten(2))
        for block in self.blocks:
            x = block(x, bias)
        logits = self.head(F.rms_norm(x, x.shape[-1:], self.norm, 1e-6))
        return logits.unflatten(-1, (self.config.n_predicted_codebooks, -1))


def from_params(params: Mapping[str, Any], config: ModelConfig) -> TorchVampNet:
    """The same network with the weights of `vampnet_jax.init` or `load`."""
    model = TorchVampNet(config)

    def tensor(array: Any, *shape: int) -> Tensor:
        return torch.from_numpy(np.array(array, np.float32).reshape(shape))

    width, n = config.embedding_dim, config.n_codebooks
    embedding, blocks = params["embedding"], params["blocks"]
    table = np.concatenate(
        [np.asarray(embedding["codebooks"]), np.asarray(embedding["mask"])[:, None]], axis=1
    )
    state = {
        "tables": tensor(table, -1, config.latent_dim),
        "project.weight": tensor(embedding["kernel"], n * config.latent_dim, width).T,
        "project.bias": tensor(embedding["bias"], width),
        "position_table": tensor(params["position_bias"], 32, config.n_heads),
        "norm": tensor(params["norm"], width),
        "head.weight": tensor(params["head"]["kernel"], width, -1).T,
        "head.bias": tensor(params["head"]["bias"], -1),
    }
    for i in range(config.n_layers):
        qkv = [tensor(blocks[name][i], width, width).T for name in ("query", "key", "value")]
        state |= {
            f"blocks.{i}.attention_norm": tensor(blocks["attention_norm"][i], width),
            f"blocks.{i}.qkv.weight": torch.cat(qkv),
            f"blocks.{i}.out.weight": tensor(blocks["out"][i], width, width).T,
            f"blocks.{i}.feed_forward_norm": tensor(blocks["feed_forward_norm"][i], width),
            f"blocks.{i}.up.weight": tensor(blocks["up"][i], width, 4 * width).T,
            f"blocks.{i}.down.weight": tensor(blocks["down"][i], 2 * width, width).T,
        }
    model.load_state_dict(state | {"first_rows": model.first_rows})
    return model.eval().requires_grad_(False)


def filter_logits(logits: Tensor, options: SamplingOptions) -> Tensor:
    """Typical, top-k and top-p filtering of [..., V]: what is dropped becomes −inf."""

    def drop(order: Tensor, dropped: Tensor) -> Tensor:
        """Drop the tokens `order[dropped]`."""
        places = torch.zeros_like(dropped).scatter(-1, order, dropped)
        return logits.masked_fill(places, -math.inf)

    if options.typical_mass is not None and options.typical_mass < 1:
        log_p = logits.log_softmax(-1)
        p = log_p.exp()
        entropy = -(p * log_p).sum(-1, keepdim=True)
        order = (-log_p - entropy).abs().argsort(-1)
        held = p.gather(-1, order).cumsum(-1)
        count = (held < options.typical_mass).sum(-1, keepdim=True) + 1  # the crossing one too
        count = count.clamp(min=options.typical_min_tokens)
        logits = drop(order, torch.arange(logits.shape[-1], device=logits.device) >= count)
    if options.top_k is not None:
        least = logits.topk(options.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if options.top_p is not None:
        ranked, order = logits.sort(-1, descending=True)
        p = ranked.softmax(-1)
        logits = drop(order, p.cumsum(-1) - p > options.top_p)
    return logits


class Sampler(nn.Module):
    """Iterative decoding (VampNet, section 3.3); `compile_step` makes the compiled yardstick."""

    def __init__(self, model: TorchVampNet, options: SamplingOptions):
        super().__init__()
        self.model = model
        self.options = options
        self.step = self._step

    def compile_step(self) -> None:
        """From now on every step runs as one compiled graph."""
        self.step = torch.compile(self._step, dynamic=False)

    def _step(
        self, given: Tensor, filled: Tensor, masked: Tensor, bias: Tensor,
        u: Tensor, noise: Tensor, share: Tensor, count: Tensor, greedy: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Fill every masked token of [B, T, Cp]; mask the `count` [B] least confident again."""
        config, options = self.model.config, self.options
        current = filled.masked_fill(masked, config.mask_token).transpose(1, 2)
        logits = filter_logits(self.model(torch.cat([given, current], 1), bias), options)
        log_p = (logits / options.temperature).log_softmax(-1)
        if greedy:
            drawn = log_p.argmax(-1)
        else:
            sums = log_p.exp().cumsum(-1)
            target = u[..., None] * sums[..., -1:]
            drawn = torch.searchsorted(sums, target, right=True)[..., 0]
        confidence = log_p.gather(-1, drawn[..., None])[..., 0]
        confidence = confidence + options.mask_temperature * share * noise
        flat = torch.where(masked, confidence, math.inf).flatten(1)
        rank = flat.argsort(dim=-1, stable=True).argsort(-1)
        again = (rank < count[:, None]).view_as(masked) & masked
        return torch.where(masked, drawn, filled), again

    @torch.inference_mode()
    def forward(self, tokens: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """tokens int64 [B, C, T], mask bool [B, C, T] → tokens."""
        options, n_given = self.options, self.model.config.n_conditioning_codebooks
        given = tokens[:, :n_given]
        filled = tokens[:, n_given:].transpose(1, 2).contiguous()
        masked = mask[:, n_given:].transpose(1, 2).contiguous()
        n_masked = masked.flatten(1).sum(1)
        bias = self.model.position_bias(tokens.shape[-1])
        progress = torch.arange(1, options.steps + 1) / options.steps
        gammas = torch.cos(progress * (math.pi / 2)).clamp(min=1e-10)
        for i, (r, gamma) in enumerate(zip(progress, gammas, strict=True)):
            still = masked.flatten(1).sum(1)
            wanted = (gamma * n_masked).floor().long()
            count = torch.minimum(wanted, still - 1).clamp(min=1)
            if i + 1 == options.steps:
                count = torch.zeros_like(count)
            u, v = torch.rand(2, *masked.shape, generator=generator)
            noise = -torch.log(-torch.log(v.clamp(min=1e-20)))
            greedy = i / options.steps >= options.sample_cutoff
            filled, masked = self.step(given, filled, masked, bias, u, noise, 1 - r, count, greedy)
        return torch.cat([given, filled.transpose(1, 2)], 1)
