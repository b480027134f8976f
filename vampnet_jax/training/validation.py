"""The loss on held-out excerpts under fixed masks: the same weights give the same number.

Neither the excerpts nor the masks depend on a run's seed, so runs can be compared too.
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vampnet_jax.config import ModelConfig
from vampnet_jax.model import Params
from vampnet_jax.training.distributed import settle
from vampnet_jax.training.excerpts import fixed_excerpts
from vampnet_jax.training.objective import (
    RATIO_BINS,
    TOP_K,
    Sums,
    draw_masks,
    mask_ratios,
    masked_sums,
)
from vampnet_jax.training.sharding import Layout
from vampnet_jax.training.tokens import TrackReader

MASK_SEED = 0


class Validation:
    """Fixed excerpts and masks of held-out tracks.

    Args:
      reader: the held-out tracks, all at least `window` frames long.
      config: the model that will be scored.
      window: frames per excerpt.
      count: excerpts; every source has one at least.
      batch_size: excerpts scored at once.
      layout: divides them over several devices; every process must then score.
    """

    def __init__(
        self,
        reader: TrackReader,
        config: ModelConfig,
        window: int,
        count: int,
        batch_size: int,
        layout: Layout | None = None,
    ) -> None:
        self.config = config
        self.batch_size = batch_size
        self.tokens, self.sources = fixed_excerpts(reader, config.n_codebooks, window, count)
        numbers = jnp.arange(len(self.tokens), dtype=jnp.uint32)
        self.ratios = mask_ratios(jnp.uint32(MASK_SEED), numbers)
        keys = jax.vmap(lambda n: jax.random.fold_in(jax.random.key(MASK_SEED), n))(numbers)
        self.mask = np.asarray(draw_masks(keys, self.ratios, window, config))
        self._layout = layout
        if layout is None:
            self._score = jax.jit(functools.partial(masked_sums, config=config))
        else:
            score = functools.partial(
                masked_sums, config=config, place=layout.split_batch, shards=layout.batch_shards
            )
            self._score = jax.jit(score, out_shardings=layout.whole)

    def score(self, params: Params) -> dict[str, float]:
        """Score a model's parameters, dropout off.

        Returns:
          `log_loss` in nats per masked token, over all and by source (`log_loss/<source>`), and
          loss (`log_loss_at/<bin>`), top-1 and top-25 accuracies by bin of the mask ratio.
        """
        return self._metrics([settle(self._score(params, *batch)) for batch in self._batches()])

    def score_unigram(self, frequencies: np.ndarray) -> dict[str, float]:
        """Score the model that knows only how frequent each token is: `[C, V]`, summing to 1.

        Returns:
          What `score` does.
        """
        given = self.config.n_conditioning_codebooks
        codebooks = np.arange(given, self.config.n_codebooks)[:, None]  # [Cp, 1]
        tokens, scored = self.tokens[:, given:], self.mask[:, given:]  # [N, Cp, T]
        log_loss = -np.log(frequencies)[codebooks, tokens]
        # Of equally frequent tokens one alone can be the likeliest.
        rank = np.argsort(np.argsort(-frequencies, axis=1), axis=1)[codebooks, tokens]

        def total(values: np.ndarray) -> jax.Array:
            return jnp.asarray((values * scored).sum((1, 2)))

        loss = total(log_loss)
        counted = total(np.ones_like(log_loss))
        return self._metrics([Sums(counted, loss, loss, total(rank == 0), total(rank < TOP_K))])

    def _batches(self) -> Iterator[tuple[np.ndarray | jax.Array, np.ndarray | jax.Array]]:
        n, size = len(self.tokens), self.batch_size
        for start in range(0, n, size):
            index = np.arange(start, start + size)
            real = (index < n)[:, None, None]  # the last batch is filled with unscored excerpts
            index = np.minimum(index, n - 1)
            tokens, mask = self.tokens[index], self.mask[index] & real
            if self._layout is None:
                yield tokens, mask
            else:
                yield self._layout.divide(tokens), self._layout.divide(mask)

    def _metrics(self, batches: Sequence[Sums]) -> dict[str, float]:
        def joined(name: str) -> np.ndarray:
            values = np.concatenate([np.asarray(getattr(batch, name)) for batch in batches])
            return values[: len(self.tokens)].astype(np.float64)

        tokens, log_loss = joined("tokens"), joined("log_loss")
        top_1, top_k = joined("top_1"), joined("top_k")
        metrics = self._loss_by_source(tokens, log_loss)
        ratios = np.asarray(self.ratios)
        for name, (low, high) in RATIO_BINS.items():
            chosen = (ratios >= low) & (ratios < high)
            count = tokens[chosen].sum()
            if count:
                metrics[f"log_loss_at/{name}"] = float(log_loss[chosen].sum() / count)
                metrics[f"top1/{name}"] = float(top_1[chosen].sum() / count)
                metrics[f"top25/{name}"] = float(top_k[chosen].sum() / count)
        return metrics

    def _loss_by_source(self, counts: np.ndarray, sums: np.ndarray) -> dict[str, float]:
        metrics = {"log_loss": float(sums.sum() / max(counts.sum(), 1))}
        for source in sorted(set(self.sources)):
            chosen = np.array([name == source for name in self.sources])
            if counts[chosen].sum():
                value = sums[chosen].sum() / counts[chosen].sum()
                metrics[f"log_loss/{source}"] = float(value)
        return metrics


def count_tokens(reader: TrackReader) -> np.ndarray:
    """How many times each code of each codebook occurs in the tracks, `[C, V]`."""
    codec = reader.manifest.codec
    counts = np.zeros((codec.n_codebooks, codec.codebook_size))
    for index, track in enumerate(reader.tracks):
        tokens, _ = reader.read(index, 0, track.frames)
        for codebook, row in enumerate(tokens):
            counts[codebook] += np.bincount(row, minlength=codec.codebook_size)
    return counts


def token_frequencies(reader: TrackReader) -> np.ndarray:
    """How often each code of each codebook occurs in the tracks, `[C, V]`, each row summing to 1.

    One is added to every count, so that unseen codes are not impossible.
    """
    counts = 1 + count_tokens(reader)
    return counts / counts.sum(axis=1, keepdims=True)
