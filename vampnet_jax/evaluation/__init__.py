"""Distances between recordings and between sets of them, and the paper's experiments.

Source: VampNet, sections 4 and 5.
"""

from vampnet_jax.evaluation.distances import mel_distance, stft_distance

__all__ = ["mel_distance", "stft_distance"]
