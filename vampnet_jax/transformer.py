"""The masked transformer as Flax NNX modules. Use it through `vampnet_jax.model`.

Letters in shapes and einsums: B batch, T frames (queries t, keys s), C codebooks (p predicted),
V codes, d latent width, D width, H heads, K width of a head, F hidden width of the feed-forward.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from codec_bridge.errors import InputError
from vampnet_jax.config import ModelConfig
from vampnet_jax.keys import example_keys
from vampnet_jax.lora import Adapters
from vampnet_jax.products import product

Placement = Callable[[jax.Array], jax.Array]
"""Identity that may say where an array `[B, …]` lies on the devices."""
RMS_EPSILON = 1e-6
POSITION_BUCKETS = 32
"""Rows of the relative-position table: half for keys before the query, half for keys after."""
MAX_DISTANCE = 128
"""Keys this far away or further share the last bucket of their side."""
UNROLLED_LAYERS = 4
"""Models of so few blocks are compiled block after block, which saves a loop its copies; not with
`remat`, as XLA for CPUs would then find what is computed again the same as before, and keep it."""

_lecun = nnx.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=0)


def relative_position_buckets(n_frames: int) -> np.ndarray:
    """Bucket of every (query, key) pair, int32 `[T, T]` (T5: Raffel et al. 2020, section 2.1).

    The first eight distances have a bucket each; after that buckets widen by √2 up to
    `MAX_DISTANCE`. Computed in integers, so that no rounding of a logarithm can move a border.
    """
    side = POSITION_BUCKETS // 2
    exact = side // 2
    offset = np.arange(n_frames)[None, :] - np.arange(n_frames)[:, None]  # key − query
    distance = np.abs(offset).astype(np.int64)
    # trunc(log(m/8) / log(16) · 8) = number of j ≥ 1 with m² ≥ 8² · 2ʲ
    ratio = MAX_DISTANCE // exact
    growth = ratio ** (2 / (side - exact))
    borders = exact**2 * growth ** np.arange(1, side - exact)
    widening = exact + np.searchsorted(np.round(borders), distance**2, side="right")
    bucket = np.where(distance < exact, distance, widening)
    return (bucket + np.where(offset > 0, side, 0)).astype(np.int32)


def bias_of_frames(table: jax.Array, n_frames: int) -> jax.Array:
    """Look up the bias of every (query, key) pair: `[32, H]` → `[H, T, T]`."""
    return jnp.moveaxis(table[relative_position_buckets(n_frames)], -1, 0)


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """RMSNorm over the last axis in float32, back in the input's dtype (Zhang & Sennrich 2019)."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + RMS_EPSILON)
    return (y * jnp.expand_dims(scale.astype(jnp.float32), range(x.ndim - 1))).astype(x.dtype)


def dropout_seeds(key: jax.Array, batch: int, config: ModelConfig) -> jax.Array:
    """Seeds of every dropout of every example: uint32 `[L, 4, B, 2]`.

    Args:
      key: one key (example b uses fold_in(key, b)) or B keys.
      batch: B.
      config: gives L.
    """
    keys = example_keys(key, batch)
    shape = (config.n_layers, 4, 2)
    return jnp.moveaxis(jax.vmap(lambda k: jax.random.bits(k, shape))(keys), 0, 2)


def dropout(x: jax.Array, rate: float, seed: jax.Array | None) -> jax.Array:
    """Zero a share `rate` of x `[B, …]` and scale up the rest; without a seed, x itself.

    Which values are zeroed is a hash (the last step of MurmurHash3, twice) of the example's seed,
    uint32 `[B, 2]`, and the position within the example: the same however the batch is divided,
    and far fewer operations than JAX's generator takes, which is felt where a draw is needed for
    each pair of frames in each head.
    """
    if seed is None or rate == 0.0:
        return x
    first, second = (seed[:, n].reshape(-1, *[1] * (x.ndim - 1)) for n in range(2))
    position = lax.broadcasted_iota(jnp.uint32, (1, *x.shape[1:]), x.ndim - 1)
    stride = x.shape[-1]
    for axis in range(x.ndim - 2, 0, -1):
        index = lax.broadcasted_iota(jnp.uint32, (1, *x.shape[1:]), axis)
        position, stride = position + np.uint32(stride) * index, stride * x.shape[axis]
    draw = _mix(_mix(position + first) ^ second)
    keep = draw >= np.uint32(round(rate * 2**32))
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def _mix(h: jax.Array) -> jax.Array:
    """Every bit of the input changes every bit of the output half of the time: uint32 → uint32."""
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


class Embedding(nnx.Module):
    """Codec vectors of the C tokens of a frame, concatenated and projected to D."""

    def __init__(self, config: ModelConfig, codebooks: jax.Array, rngs: nnx.Rngs) -> None:
        n, d = config.n_codebooks, config.latent_dim
        self.codebooks = nnx.Param(codebooks)
        self.mask = nnx.Param(jax.random.normal(rngs.params(), (n, d)))
        kernel = _lecun(rngs.params(), (n * d, config.embedding_dim), jnp.float32)
        self.kernel = nnx.Param(kernel.reshape(n, d, config.embedding_dim))
        self.bias = nnx.Param(jnp.zeros(config.embedding_dim))

    def latents(self, tokens: jax.Array) -> jax.Array:
        """Look up int32 `[B, C, T]` → `[B, C, T, d]`; id V is the learned MASK vector."""
        frozen = lax.stop_gradient(self.codebooks[...])  # [C, V, d]
        table = jnp.concatenate([frozen, self.mask[...][:, None]], axis=1)  # [C, V+1, d]
        return jax.vmap(lambda rows, ids: rows[ids], in_axes=(0, 1), out_axes=1)(table, tokens)

    def __call__(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
        latents = self.latents(tokens).astype(dtype)
        x = jnp.einsum("BCTd,CdD->BTD", latents, self.kernel[...].astype(dtype))
        return x + self.bias[...].astype(dtype)[None, None]


class Block(nnx.Module):
    """Pre-norm attention and gated feed-forward, both residual."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        d, h, k = config.embedding_dim, config.n_heads, config.head_dim
        f = 2 * d
        residual = (2 * config.n_layers) ** -0.5  # keeps the residual stream's scale (GPT-2)

        def projection(n_in: int, *shape: int, scale: float = 1.0) -> nnx.Param:
            kernel = _lecun(rngs.params(), (n_in, int(np.prod(shape)) // n_in), jnp.float32)
            return nnx.Param(scale * kernel.reshape(shape))

        self.attention_norm = nnx.Param(jnp.ones(d))
        self.query = projection(d, d, h, k)
        self.key = projection(d, d, h, k)
        self.value = projection(d, d, h, k)
        self.out = projection(d, h, k, d, scale=residual)
        self.feed_forward_norm = nnx.Param(jnp.ones(d))
        self.up = projection(d, d, 2, f)
        self.down = projection(f, f, d, scale=residual)

    def __call__(
        self,
        x: jax.Array,
        bias: jax.Array,
        config: ModelConfig,
        seeds: jax.Array | None,
        adapters: Adapters,
    ) -> jax.Array:
        """Transform `[B, T, D]`; bias as in `mix_values`, seeds `[4, B, 2]` switch dropout on."""
        seed = (None,) * 4 if seeds is None else seeds
        rate = config.dropout
        normal = rms_norm(x, self.attention_norm[...])
        attended = self.attend(normal, bias, config, seed[0], adapters)
        x = x + dropout(attended, rate, seed[1])
        normal = rms_norm(x, self.feed_forward_norm[...])
        fed = self.feed_forward(normal, config, seed[2], adapters)
        return x + dropout(fed, rate, seed[3])

    def project(
        self, letters: str, x: jax.Array, name: str, config: ModelConfig, adapters: Adapters
    ) -> jax.Array:
        """Multiply by a weight, to which an adapter may add A·B (`vampnet_jax.lora`)."""
        multiply = product if config.dtype == "bfloat16-products" else jnp.einsum
        y = multiply(letters, x, getattr(self, name)[...].astype(x.dtype))
        if name in adapters:
            a, b = (adapters[name][part].astype(x.dtype) for part in "ab")
            y = y + jnp.tensordot(jnp.tensordot(x, a, a.ndim - 1), b, 1)
        return y

    def attend(
        self,
        x: jax.Array,
        bias: jax.Array,
        config: ModelConfig,
        seed: jax.Array | None,
        adapters: Adapters,
    ) -> jax.Array:
        """Bidirectional attention with a relative-position bias; no biases in projections."""
        q = self.project("BTD,DHK->BTHK", x, "query", config, adapters)
        k = self.project("BTD,DHK->BTHK", x, "key", config, adapters)
        v = self.project("BTD,DHK->BTHK", x, "value", config, adapters)
        if config.attention == "cudnn":
            mixed = jax.nn.dot_product_attention(
                q, k, v, bias=bias[None].astype(x.dtype), implementation="cudnn"
            )
        else:
            mix = mix_values
            if config.remat == "attention":
                mix = jax.checkpoint(mix, prevent_cse=False, static_argnums=5)
            mixed = mix(q, k, v, bias, seed, config.dropout)
        return self.project("BTHK,HKD->BTD", mixed, "out", config, adapters)

    def feed_forward(
        self, x: jax.Array, config: ModelConfig, seed: jax.Array | None, adapters: Adapters
    ) -> jax.Array:
        """Gated GELU (Shazeer 2020): a · gelu(b)."""
        hidden = self.project("BTD,DgF->BTgF", x, "up", config, adapters)
        hidden = hidden[:, :, 0] * jax.nn.gelu(hidden[:, :, 1], approximate=True)
        hidden = dropout(hidden, config.dropout, seed)
        return self.project("BTF,FD->BTD", hidden, "down", config, adapters)


def mix_values(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array,
    seed: jax.Array | None,
    rate: float,
) -> jax.Array:
    """Values `[B, T, H, K]` averaged by attention: softmax(q·k / √K + bias), in float32.

    The bias is `[H, T, T]`, or `[S, H, T, T]` where each of S equal parts of the batch has its own.
    """
    q = q / np.sqrt(q.shape[-1]).astype(q.dtype)
    scores = jnp.einsum("BtHK,BsHK->BHts", q, k, preferred_element_type=jnp.float32)
    bias = bias.astype(jnp.float32)
    if bias.ndim == 3:
        scores = scores + bias[None]
    else:
        by_part = scores.reshape(bias.shape[0], -1, *scores.shape[1:])
        scores = (by_part + bias[:, None]).reshape(scores.shape)
    weights = jax.nn.softmax(scores, axis=-1)
    weights = dropout(weights, rate, seed).astype(v.dtype)
    return jnp.einsum("BHts,BsHK->BtHK", weights, v)


class Head(nnx.Module):
    """Linear layer to the logits of every predicted codebook.

    The original normalises its weight per output row; here that is folded into the kernel, the
    same function with fewer parameters.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        d, p, v = config.embedding_dim, config.n_predicted_codebooks, config.vocab_size
        self.kernel = nnx.Param(_lecun(rngs.params(), (d, p * v), jnp.float32).reshape(d, p, v))
        self.bias = nnx.Param(jnp.zeros((p, v)))

    def __call__(
        self, x: jax.Array, config: ModelConfig, codebook: jax.Array | int | None = None
    ) -> jax.Array:
        """`[B, T, D]` → float32 `[B, T, Cp, V]`; of one predicted codebook `[B, T, 1, V]`."""
        kernel, bias = self.kernel[...], self.bias[...]
        if codebook is not None:
            kernel = lax.dynamic_slice_in_dim(kernel, codebook, 1, axis=1)
            bias = lax.dynamic_slice_in_dim(bias, codebook, 1, axis=0)
        letters, kernel = "BTD,DpV->BTpV", kernel.astype(x.dtype)
        if config.dtype == "bfloat16-products":
            logits = product(letters, x, kernel)
        else:
            logits = jnp.einsum(letters, x, kernel, preferred_element_type=jnp.float32)
        return logits + bias[None, None]


class VampNet(nnx.Module):
    """Embedding, L blocks with stacked parameters run by a scan, norm and head."""

    def __init__(self, config: ModelConfig, codebooks: jax.Array, rngs: nnx.Rngs) -> None:
        self.embedding = Embedding(config, codebooks, rngs)
        keys = jax.random.split(rngs.params(), config.n_layers)
        self.blocks = nnx.vmap(lambda key: Block(config, nnx.Rngs(params=key)))(keys)
        shape = (POSITION_BUCKETS, config.n_heads)
        self.position_bias = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))
        self.norm = nnx.Param(jnp.ones(config.embedding_dim))
        self.head = Head(config, rngs)

    def bias_of_frames(self, n_frames: int) -> jax.Array:
        """The bias of every (query, key) pair, `[H, T, T]`, shared by all blocks."""
        return bias_of_frames(self.position_bias[...], n_frames)

    def __call__(
        self,
        tokens: jax.Array,
        config: ModelConfig,
        bias: jax.Array | None,
        seeds: jax.Array | None,
        adapters: Adapters,
        place: Placement,
    ) -> jax.Array:
        """Tokens int32 `[B, C, T]` → what the head sees, `[B, T, D]`."""
        if seeds is not None and config.attention == "cudnn" and config.dropout > 0:
            raise InputError(
                "cuDNN attention has no dropout on its weights; train with attention 'xla', or "
                "with dropout 0."
            )
        if bias is None:
            bias = self.bias_of_frames(tokens.shape[-1])
        x = place(self.embedding(tokens, jnp.dtype(config.activation_dtype)))
        graphdef, stacked = nnx.split(self.blocks)

        def step(x: jax.Array, layer: tuple) -> tuple[jax.Array, None]:
            params, seeds, pairs = layer
            return place(nnx.merge(graphdef, params)(x, bias, config, seeds, pairs)), None

        if config.remat == "dots":
            saved = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            step = jax.checkpoint(step, prevent_cse=False, policy=saved)
        elif config.remat == "full":
            step = jax.checkpoint(step, prevent_cse=False)
        unroll = config.n_layers <= UNROLLED_LAYERS and config.remat == "none"
        x, _ = lax.scan(step, x, (stacked, seeds, adapters), unroll=unroll)
        return rms_norm(x, self.norm[...])
