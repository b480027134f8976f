"""The training step: a pure function of (state, batch), and nothing else."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vampnet_jax import lora
from vampnet_jax.model import Params, init
from vampnet_jax.training.config import TrainConfig
from vampnet_jax.training.objective import (
    draw_masks,
    mask_ratios,
    masked_sums,
    metrics_by_ratio,
)
from vampnet_jax.training.optimizer import optimizer, schedule
from vampnet_jax.training.spikes import judge

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
    blocks = {k: v.astype(config.model.dtype) for k, v in frozen["blocks"].items() if v.ndim > 2}
    return frozen | {"blocks": frozen["blocks"] | blocks}


def init_state(
    config: TrainConfig, codebooks: jax.Array, frequencies: jax.Array | None = None
) -> TrainState:
    """The state before the first step; for LoRA `frozen` is empty, and the caller's to fill.

    Args:
      config: all settings.
      codebooks: float32 `[≥C, V, d]`.
      frequencies: how often each token occurs, `[≥C, V]`. With them the untrained model predicts
        just these, so that no steps are spent on learning them.
    """
    key = jax.random.key(config.seed)
    used = jnp.asarray(codebooks[: config.model.n_codebooks], jnp.float32)
    if config.lora is not None:
        params = lora.init(key, config.model, config.lora)
    else:
        params = without_codebooks(init(key, config.model, codebooks))
        if frequencies is not None:
            given, n = config.model.n_conditioning_codebooks, config.model.n_codebooks
            kernel = jnp.zeros_like(params["head"]["kernel"])
            params["head"] = {"kernel": kernel, "bias": jnp.log(frequencies[given:n])}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params) if config.ema_decay else {},
        moments=optimizer(config).init(params),
        codebooks=used,
        frozen={},
        spikes={"usual_norm": jnp.zeros((), jnp.float32)} if config.skip_spikes else {},
    )


def train_step(
    state: TrainState, tokens: jax.Array, done: jax.Array, config: TrainConfig
) -> tuple[TrainState, Metrics]:
    """Take one step.

    Args:
      state: as `init_state` or the step before returned.
      tokens: int32 `[B, C, T]`.
      done: float32, share of the run that is done, for the cosine schedule.
      config: static.

    Returns:
      The new state and the step's metrics: loss (label smoothing included), log_loss, accuracies,
      gradient_norm (before clipping), learning_rate, parameter_norm (afterwards; of what is
      trained) and, with skip_spikes, skipped: 1 where the step changed nothing.
    """
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    mask_key, dropout_key = jax.random.split(key)
    batch, _, n_frames = tokens.shape
    examples = state.step.astype(jnp.uint32) * jnp.uint32(batch)
    examples = examples + jnp.arange(batch, dtype=jnp.uint32)
    ratios = mask_ratios(jnp.asarray(np.uint32(config.seed % 2**32)), examples)
    keys = jax.vmap(lambda b: jax.random.fold_in(mask_key, b))(jnp.arange(batch))
    mask = draw_masks(keys, ratios, n_frames, config.model)

    def loss_of(params: Params) -> tuple[jax.Array, Metrics]:
        sums = masked_sums(
            full_params(params, state, config),
            tokens,
            mask,
            config.model,
            label_smoothing=config.label_smoothing,
            dropout_key=dropout_key if config.model.dropout else None,
        )
        metrics = metrics_by_ratio(sums, ratios)
        return metrics["loss"], metrics

    gradient, metrics = jax.grad(loss_of, has_aux=True)(state.params)
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
    return taken, metrics


def model_params(state: TrainState, config: TrainConfig) -> Params:
    """The parameters to use: the moving average where one is kept."""
    return full_params(state.ema or state.params, state, config)
