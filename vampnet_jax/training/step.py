"""The training step: a pure function of (state, batch), and nothing else."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vampnet_jax import lora
from vampnet_jax.model import Params, init
from vampnet_jax.training.config import TrainConfig
from vampnet_jax.training.objective import (
    Sums,
    draw_gaps,
    draw_level_masks,
    draw_masks,
    mask_ratios,
    masked_sums,
    metrics_by_ratio,
)
from vampnet_jax.training.optimizer import optimizer, schedule
from vampnet_jax.training.sharding import Layout
from vampnet_jax.training.spikes import judge
from vampnet_jax.training.untrained import fit_to_codec

Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """Everything that a step changes, and what it needs of the codec."""

    step: jax.Array
    """int32, steps taken; with the seed it decides the next step's data and randomness."""
    params: Params
    """What is trained: the model's parameters without the codebooks, or LoRA adapters."""
    ema: Params
    """Moving average of `params`; an empty dict if none is kept."""
    moments: Any
    """The optimiser's state."""
    codebooks: jax.Array
    """float32 `[C, V, d]`, the codec's; never trained nor decayed."""
    frozen: Params
    """The parameters that adapters adapt, never changed nor saved; an empty dict without LoRA."""
    spikes: Params
    """`usual_norm`, the running mean of the gradient's norm; an empty dict without skip_spikes."""


def with_codebooks(params: Params, codebooks: jax.Array) -> Params:
    """The parameters that `vampnet_jax.apply` takes."""
    return params | {"embedding": params["embedding"] | {"codebooks": codebooks}}


def without_codebooks(params: Params) -> Params:
    """The parameters that are trained."""
    embedding = {k: v for k, v in params["embedding"].items() if k != "codebooks"}
    return params | {"embedding": embedding}


def full_params(trained: Params, state: TrainState, config: TrainConfig) -> Params:
    """The parameters that `vampnet_jax.apply` takes, from what is trained and what is not.

    Args:
      trained: `params` or `ema` of the state.
      state: gives the rest.
      config: says whether these are LoRA adapters.
    """
    if config.lora is None:
        return with_codebooks(trained, state.codebooks)
    return lora.attach(with_codebooks(state.frozen, state.codebooks), trained, config.lora)


def freeze(params: Params, config: TrainConfig) -> Params:
    """The `frozen` tree of a LoRA run, from parameters as `vampnet_jax.apply` takes them.

    Matrices are kept in the dtype that they are used in, so bfloat16 halves their memory.
    """
    frozen = without_codebooks(params)
    dtype = config.model.product_dtype
    blocks = {k: v.astype(dtype) for k, v in frozen["blocks"].items() if v.ndim > 2}
    return frozen | {"blocks": frozen["blocks"] | blocks}


def init_state(
    config: TrainConfig, codebooks: jax.Array, frequencies: jax.Array | None = None
) -> TrainState:
    """The state before the first step; for LoRA `frozen` is empty, and the caller's to fill.

    Args:
      config: all settings.
      codebooks: float32 `[≥C, V, d]`.
      frequencies: how often each token occurs, `[≥C, V]`. With them the untrained model is
        fitted to them and to the codes, so that no steps are spent on learning these.
    """
    key = jax.random.key(config.seed)
    used = jnp.asarray(codebooks[: config.model.n_codebooks], jnp.float32)
    if config.lora is not None:
        params = lora.init(key, config.model, config.lora)
    else:
        params = init(key, config.model, codebooks)
        if frequencies is not None:
            params = fit_to_codec(params, frequencies, jax.random.fold_in(key, 1), config.model)
        params = without_codebooks(params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params) if config.ema_decay else {},
        moments=optimizer(config).init(params),
        codebooks=used,
        frozen={},
        spikes={"usual_norm": jnp.zeros((), jnp.float32)} if config.skip_spikes else {},
    )


def abstract_state(config: TrainConfig) -> TrainState:
    """The state's shapes and dtypes, with those of the frozen model of a LoRA run."""
    model = config.model
    shape = (model.n_codebooks, model.vocab_size, model.latent_dim)
    codebooks = jax.ShapeDtypeStruct(shape, jnp.float32)
    state = jax.eval_shape(functools.partial(init_state, config), codebooks)
    if config.lora is None:
        return state
    frozen = jax.eval_shape(
        lambda codebooks: freeze(init(jax.random.key(0), model, codebooks), config), codebooks
    )
    return state._replace(frozen=frozen)


def init_on(
    layout: Layout, config: TrainConfig, codebooks: np.ndarray, frequencies: np.ndarray
) -> TrainState:
    """`init_state` on many devices: each makes only the parts of the arrays that it keeps."""
    shardings = layout.shardings(abstract_state(config)._replace(frozen={}))
    start = jax.jit(init_state, static_argnums=0, out_shardings=shardings)
    return start(config, codebooks, frequencies.astype(np.float32))


def jitted_step(config: TrainConfig, layout: Layout | None = None) -> jax.stages.Wrapped:
    """`train_step` of a run, compiled at its first call; the state before the step is used up."""
    step = functools.partial(train_step, config=config, layout=layout)
    return jax.jit(step, donate_argnames="state")


def train_step(
    state: TrainState,
    tokens: jax.Array,
    done: jax.Array,
    config: TrainConfig,
    layout: Layout | None = None,
) -> tuple[TrainState, Metrics]:
    """Take one step.

    Masks and dropout are functions of the seed, the step and an example's number in the batch, so
    the step is the same, to rounding, however the batch is divided over devices or in time.

    Args:
      state: as `init_state` or the step before returned.
      tokens: int32 `[B, C, T]`.
      done: float32, share of the run that is done, for the cosine schedule.
      config: static.
      layout: static; where the arrays lie on several devices.

    Returns:
      The new state and the step's metrics: loss (label smoothing included), log_loss, accuracies,
      gradient_norm (before clipping), learning_rate, parameter_norm (afterwards; of what is
      trained) and, with skip_spikes, skipped: 1 where the step changed nothing.
    """
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    mask_key, dropout_key = jax.random.split(key)
    batch, _, n_frames = tokens.shape
    numbers = jnp.arange(batch, dtype=jnp.uint32)
    examples = state.step.astype(jnp.uint32) * jnp.uint32(batch) + numbers
    ratios = mask_ratios(jnp.asarray(np.uint32(config.seed % 2**32)), examples)
    mask_keys, dropout_keys = (
        jax.vmap(functools.partial(jax.random.fold_in, key))(numbers)
        for key in (mask_key, dropout_key)
    )
    mask = _draw_mask(mask_keys, ratios, examples, n_frames, config)
    gradient, sums = _gradient(state, (tokens, mask, dropout_keys), config, layout)
    metrics = metrics_by_ratio(sums, ratios)
    rate = schedule(config)(state.step, done)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes floats and step counts
        updates, moments = optimizer(config).update(gradient, state.moments, state.params)
    params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
    ema = state.ema
    if config.ema_decay:
        n = state.step.astype(jnp.float32)
        decay = jnp.minimum(config.ema_decay, (1 + n) / (10 + n))  # forgets the first steps soon
        ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, params)
    norm = optax.tree.norm(gradient)
    spikes = state.spikes
    if config.skip_spikes:
        good, usual = judge(norm, spikes["usual_norm"], state.step, config.skip_spikes)
        params, ema, moments = jax.tree.map(
            lambda new, old: jnp.where(good, new, old),
            (params, ema, moments),
            (state.params, state.ema, state.moments),
        )
        spikes = {"usual_norm": usual}
        metrics["skipped"] = 1 - good.astype(jnp.float32)
    metrics |= {"gradient_norm": norm, "learning_rate": rate}
    metrics["parameter_norm"] = optax.tree.norm(params)
    taken = state._replace(
        step=state.step + 1, params=params, ema=ema, moments=moments, spikes=spikes
    )
    if layout is not None:
        taken = layout.constrain(taken)
        metrics = jax.lax.with_sharding_constraint(metrics, layout.whole)
    return taken, metrics


def _draw_mask(
    keys: jax.Array, ratios: jax.Array, examples: jax.Array, n_frames: int, config: TrainConfig
) -> jax.Array:
    """Each example's mask, of one of the kinds in the shares that the run wants; `[B, C, T]`."""
    mask = draw_masks(keys, ratios, n_frames, config.model)
    if not config.level_masks and not config.prompt_masks:
        return mask
    chosen = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1)))(keys)
    chosen = chosen[:, None, None]  # level masks take the lowest, prompt masks the next
    if config.prompt_masks:
        gaps = draw_gaps(jax.vmap(lambda key: jax.random.fold_in(key, 2))(keys), n_frames)
        prompted = chosen < config.level_masks + config.prompt_masks
        mask = jnp.where(prompted, mask & gaps[:, None], mask)
    if config.level_masks:
        by_level = draw_level_masks(keys, ratios, n_frames, config.model, examples)
        mask = jnp.where(chosen < config.level_masks, by_level, mask)
    return mask


def _gradient(
    state: TrainState,
    batch: tuple[jax.Array, jax.Array, jax.Array],
    config: TrainConfig,
    layout: Layout | None,
) -> tuple[Params, Sums]:
    """Gradient of the mean loss over all masked tokens of the batch, and sums by example.

    The batch is tokens, mask and dropout keys.

    With accumulation the batch is gone through in parts. Every part is divided by the number of
    masked tokens of the whole batch, so that the parts add up to the whole's gradient.
    """
    n_masked = jnp.maximum(jnp.sum(batch[1], dtype=jnp.float32), 1.0)

    def loss_of(params: Params, tokens: jax.Array, mask: jax.Array, keys: jax.Array):
        sums = masked_sums(
            full_params(params, state, config),
            tokens,
            mask,
            config.model,
            label_smoothing=config.label_smoothing,
            dropout_key=keys if config.model.dropout else None,
            place=layout.split_batch if layout else lambda x: x,
            shards=layout.batch_shards if layout else 1,
        )
        return jnp.sum(sums.loss) / n_masked, sums

    gradient_of = jax.grad(loss_of, has_aux=True)
    if config.accumulate == 1:
        return gradient_of(state.params, *batch)

    def divided(x: jax.Array) -> jax.Array:
        """`[B, …]` → `[N, B/N, …]`; a part has examples of every device, so nothing is moved."""
        x = x.reshape(-1, config.accumulate, *x.shape[1:]).swapaxes(0, 1)
        return layout.split_batch(x, 1) if layout else x

    def add(total: Params, part: tuple) -> tuple[Params, Sums]:
        gradient, sums = gradient_of(state.params, *part)
        total = jax.tree.map(jnp.add, total, gradient)
        return layout.constrain(total) if layout else total, sums

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    parts = jax.tree.map(divided, batch)
    gradient, sums = jax.lax.scan(add, zeros, parts)
    return gradient, Sums(*(values.swapaxes(0, 1).reshape(-1) for values in sums))


def model_params(state: TrainState, config: TrainConfig) -> Params:
    """The parameters to use: the moving average where one is kept."""
    return full_params(state.ema or state.params, state, config)
