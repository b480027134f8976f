"""Small untrained codecs for tests: real networks of both kinds, quick on a CPU."""

import numpy as np

import codec_bridge
from codec_bridge.codec import Codec
from codec_bridge.config import CodecConfig
from codec_bridge.network import KINDS, tensor_shapes

SMALL = {
    "encoder_dim": 4,
    "encoder_rates": (2, 4, 8),
    "decoder_dim": 32,
    "decoder_rates": (8, 4, 2),
    "n_codebooks": 8,
    "codebook_size": 64,
    "codebook_dim": 8,
    "sample_rate": 8000,
}


def random_tensors(kind: str, config: CodecConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights of a scale that keeps signals alive through the layers, biases included."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in sorted(tensor_shapes(kind, config).items()):
        if name.endswith("alpha"):
            values = rng.uniform(0.5, 2.0, shape)
        elif name.endswith("bias"):
            values = 0.02 * rng.standard_normal(shape)
        elif name.endswith("codebook.weight"):
            values = rng.standard_normal(shape)
        else:
            # Weak residual branches (as many channels out as in) keep the network from chaos,
            # in which rounding errors grow.
            gain = 0.3 if shape[0] == shape[1] else 1.0
            values = gain * rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        tensors[name] = values.astype(np.float32)
    return tensors


def random_codec(kind: str = "dac", seed: int = 0, **sizes) -> Codec:
    """An untrained codec: 8 kHz, hop 64, 8 codebooks of 64 codes unless `sizes` say otherwise."""
    assert kind in KINDS
    config = CodecConfig.from_kwargs({**SMALL, **sizes})
    return codec_bridge.Codec(kind, config, random_tensors(kind, config, seed), device="cpu")
