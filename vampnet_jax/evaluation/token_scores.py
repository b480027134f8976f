"""How well a model knows tokens that it has not seen."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vampnet_jax.model import apply
from vampnet_jax.release import Stage


class TokenScores(NamedTuple):
    """Per example, over its masked tokens of predicted codebooks."""

    nll: np.ndarray
    """Negative log-likelihood in nats per token, float `[B]`; NaN where nothing is masked."""
    accuracy: np.ndarray
    """Share of tokens that have the highest logit, float `[B]`."""


def score_tokens(stage: Stage, tokens: np.ndarray, mask: np.ndarray) -> TokenScores:
    """Predict the masked tokens of a window from the others.

    Args:
      stage: a coarse or fine model.
      tokens: int32 `[B, C, T]`, the truth.
      mask: bool `[B, C, T]`, True = hidden from the model and scored.
    """
    given = stage.config.n_conditioning_codebooks
    mask = np.asarray(mask, bool).copy()
    mask[:, :given] = False
    hidden = jnp.where(mask, stage.config.mask_token, tokens)
    log_p = jax.nn.log_softmax(apply(stage.params, hidden, stage.config), axis=-1)
    target, scored = jnp.asarray(tokens[:, given:]), mask[:, given:]
    own = np.asarray(jnp.take_along_axis(log_p, target[..., None], axis=-1)[..., 0])
    hit = np.asarray(jnp.argmax(log_p, axis=-1) == target)
    counts = scored.sum((1, 2))
    with np.errstate(invalid="ignore"):
        nll = -(own * scored).sum((1, 2), dtype=np.float64) / counts
        return TokenScores(nll, (hit & scored).sum((1, 2)) / counts)


def token_diversity(tokens: np.ndarray) -> float:
    """Share of tokens in which two variations differ, mean over pairs: int `[N, C, T]`, N ≥ 2."""
    if tokens.ndim != 3 or len(tokens) < 2:
        raise ValueError(f"tokens are {tokens.shape}; [N >= 2, C, T] is needed")
    pairs = [(tokens[i] != tokens[:i]).mean() for i in range(1, len(tokens))]
    return float(np.average(pairs, weights=range(1, len(tokens))))
