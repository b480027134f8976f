"""Small untrained models for tests."""

import jax

import vampnet_jax as vampnet
from codec_bridge import Codec


def random_model(codec: Codec, seed: int = 0) -> vampnet.Model:
    """A coarse model of a quarter of the codec's codebooks (at least one) and a fine one of all."""
    n_coarse = max(1, codec.n_codebooks // 4)
    stages = []
    for n_codebooks, n_given in ((n_coarse, 0), (codec.n_codebooks, n_coarse)):
        config = vampnet.ModelConfig(
            n_codebooks=n_codebooks,
            n_conditioning_codebooks=n_given,
            n_layers=1,
            n_heads=2,
            embedding_dim=16,
            vocab_size=codec.codebook_size,
            latent_dim=codec.codebooks.shape[-1],
        )
        params = vampnet.init(jax.random.key(seed), config, codec.codebooks)
        stages.append(vampnet.Stage(params, config))
    return vampnet.Model(
        *stages, codec=codec, coarse_window=40, fine_window=20, name="random", card="# random\n"
    )
