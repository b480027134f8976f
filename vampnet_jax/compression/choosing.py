"""Which tokens are worth keeping: those that the model could not have guessed from the others."""

import jax.numpy as jnp
import numpy as np
from jax.nn import log_softmax

from vampnet_jax.model import apply
from vampnet_jax.release import Model
from vampnet_jax.vamping import window_starts

ROUNDS = 8
"""Times that the model is asked again, knowing what has been chosen so far."""


def order_of_worth(model: Model, tokens: np.ndarray) -> np.ndarray:
    """How early each coarse token should be kept.

    In every window the tokens that are most surprising to the coarse model come first; it then
    sees them and is asked again about the rest. The channels share what is kept.

    Args:
      model: its coarse model is asked.
      tokens: int32 `[channels, C, T]`.

    Returns:
      float32 `[Cc, T]` in [0, 1), lowest first: keeping what is below s keeps the share s of each
      window.
    """
    config = model.coarse.config
    n_codebooks, n_frames = config.n_codebooks, tokens.shape[-1]
    place = np.full((n_codebooks, n_frames), np.inf, np.float32)
    for start in window_starts(n_frames, model.coarse_window):
        span = slice(start, start + model.coarse_window)
        true = tokens[:, :n_codebooks, span]
        open_ = np.isinf(place[:, span])
        new = open_.copy()
        for round_ in range(ROUNDS):
            known = np.where(open_, config.mask_token, true)
            log_p = log_softmax(apply(model.coarse.params, jnp.asarray(known), config), axis=-1)
            picked = jnp.take_along_axis(log_p, jnp.asarray(true)[..., None], axis=-1)[..., 0]
            surprise = np.where(open_, -np.asarray(picked).mean(axis=0), -np.inf)
            left = int(open_.sum())
            # Rounds grow: the first tokens to be kept matter most.
            count = left if round_ == ROUNDS - 1 else int(new.sum() * 2.0 ** (round_ - ROUNDS))
            best = np.unravel_index(np.argsort(-surprise, axis=None)[:count], open_.shape)
            before = new.sum() - left
            place[:, span][best] = (before + np.arange(len(best[0]))) / new.sum()
            open_[best] = False
    return place
