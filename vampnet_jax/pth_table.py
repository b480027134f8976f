"""The keys of the original's checkpoint files, and where each belongs in our parameters."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator

from vampnet_jax import lora
from vampnet_jax.config import ModelConfig
from vampnet_jax.transformer import POSITION_BUCKETS


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter: its key in the file, its path here, and its axes there → here.

    Letters: D width, C codebooks, d latent width, H heads, K width of a head, R buckets, g the two
    halves of the gated unit, F their width, V codes, p predicted codebooks. `{i}` is the block,
    whose parameters are stacked here. A normalised weight is in the file as `…_g` (length) and
    `…_v` (direction) and here as their product.
    """

    torch: str
    ours: str
    axes: str
    normalised: bool = False

    @property
    def stacked(self) -> bool:
        """Whether every block has one."""
        return "{i}" in self.torch

    @property
    def file_axes(self) -> str:
        """Axes in the file."""
        return self.axes.split(" -> ")[0]

    @property
    def our_axes(self) -> str:
        """Axes in our parameters."""
        return self.axes.split(" -> ")[1]


_BLOCK = "transformer.layers.{i}."

TABLE = (
    Entry("embedding.special.MASK", "embedding/mask", "C d -> C d"),
    Entry("embedding.out_proj.weight", "embedding/kernel", "D (C d) 1 -> C d D"),
    Entry("embedding.out_proj.bias", "embedding/bias", "D -> D"),
    Entry(_BLOCK + "norm_1.weight", "blocks/attention_norm", "D -> D"),
    Entry(_BLOCK + "self_attn.w_qs.weight", "blocks/query", "(H K) D -> D H K"),
    Entry(_BLOCK + "self_attn.w_ks.weight", "blocks/key", "(H K) D -> D H K"),
    Entry(_BLOCK + "self_attn.w_vs.weight", "blocks/value", "(H K) D -> D H K"),
    Entry(_BLOCK + "self_attn.fc.weight", "blocks/out", "D (H K) -> H K D"),
    Entry(
        "transformer.layers.0.self_attn.relative_attention_bias.weight",
        "position_bias",
        "R H -> R H",
    ),
    Entry(_BLOCK + "norm_3.weight", "blocks/feed_forward_norm", "D -> D"),
    Entry(_BLOCK + "feed_forward.w_1.weight", "blocks/up", "(g F) D -> D g F"),
    Entry(_BLOCK + "feed_forward.w_2.weight", "blocks/down", "D F -> F D"),
    Entry("transformer.norm.weight", "norm", "D -> D"),
    Entry("classifier.layers.0.bias", "head/bias", "(V p) -> p V"),
    Entry("classifier.layers.0.weight", "head/kernel", "(V p) D 1 -> D p V", normalised=True),
)
"""Key in the file, path in the parameters, axes; in the file's order."""

LORA = lora.LoraConfig()
"""The adapters that every model of the original has, trained or not."""


def slots(config: ModelConfig, rank: int | None) -> Iterator[tuple[str, Entry, str, int]]:
    """Every (key, entry, part, block) of a file, in its order; without a rank, no adapters."""
    for in_blocks, group in itertools.groupby(
        TABLE, lambda entry: entry.torch.startswith("transformer.layers.")
    ):
        entries = tuple(group)
        for i in range(config.n_layers if in_blocks else 1):
            for entry in entries:
                if i > 0 and not entry.stacked:
                    continue
                parts = ["weight_g", "weight_v"] if entry.normalised else ["weight"]
                if rank is not None and target(entry) in LORA.targets:
                    parts += ["lora_A", "lora_B"]
                for part in parts:
                    key = entry.torch.format(i=i)
                    yield (key if part == "weight" else sibling(key, part)), entry, part, i


def expected(config: ModelConfig, rank: int | None) -> dict[str, tuple[int, ...]]:
    """Shape of every key of a file of this model."""
    shapes = {}
    for key, entry, part, _ in slots(config, rank):
        if part in ("lora_A", "lora_B"):
            axes = lora_axes(entry, part).split(" -> ")[0]
        elif part == "weight_g":
            axes = entry.file_axes.split(") ")[0] + ") 1 1"
        else:
            axes = entry.file_axes
        shapes[key] = shape(axes, config, rank or 0)
    return shapes


def sibling(key: str, part: str) -> str:
    """The key beside `….weight`, such as `….lora_A`."""
    return f"{key.removesuffix('weight')}{part}"


def target(entry: Entry) -> str:
    """The name that adapters of this parameter have in `vampnet_jax.lora`."""
    return entry.ours.removeprefix("blocks/")


def lora_axes(entry: Entry, part: str) -> str:
    """Axes of an adapter matrix there → here, from those of its weight `out in -> …`."""
    outputs, inputs = re.findall(r"\([^)]*\)|\S+", entry.file_axes)
    if part == "lora_A":
        return f"r {inputs} -> {inputs.strip('()')} r"
    return f"{outputs} r -> r {outputs.strip('()')}"


def reverse(axes: str) -> str:
    """The same arrangement, here → there."""
    left, right = axes.split(" -> ")
    return f"{right} -> {left}"


def letters(config: ModelConfig, rank: int = 0) -> dict[str, int]:
    """Size of every axis of the table."""
    return {
        "C": config.n_codebooks,
        "d": config.latent_dim,
        "D": config.embedding_dim,
        "H": config.n_heads,
        "K": config.head_dim,
        "R": POSITION_BUCKETS,
        "g": 2,
        "F": 2 * config.embedding_dim,
        "V": config.vocab_size,
        "p": config.n_predicted_codebooks,
        "r": rank,
        "1": 1,
    }


def shape(axes: str, config: ModelConfig, rank: int = 0) -> tuple[int, ...]:
    """Sizes of axes written as in the table; joint ones are multiplied."""
    sizes = letters(config, rank)
    groups = re.findall(r"\([^)]*\)|\S+", axes)
    return tuple(math.prod(sizes[name] for name in group.strip("()").split()) for group in groups)


def joint_sizes(axes: str, config: ModelConfig) -> dict[str, int]:
    """Sizes that einops needs to split the joint axes, such as (H K), of the file's side."""
    sizes = letters(config)
    joint = "".join(re.findall(r"\([^)]*\)", axes.split(" -> ")[0]))
    return {name: sizes[name] for name in re.findall(r"[A-Za-z]", joint)}
