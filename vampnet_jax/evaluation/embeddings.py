"""A vector per recording, for distances between sets. None of these needs a download.

| name | vector | dimensions |
|---|---|---|
| `mel-statistics` | means and deviations of 40 log mel bands and of their changes | 160 |
| `crepe-tiny` | mean and deviation over time of CREPE's last hidden layer (pitch) | 512 |

CREPE's weights come with the package torchcrepe (the extra `evaluate`). Neither was made for the
distances that the literature reports (VGGish, CLAP), so compare figures only with figures
of the same embedding.
"""

from collections.abc import Callable
from types import ModuleType

import numpy as np

from codec_bridge.audio import Audio, resample
from codec_bridge.errors import InputError
from vampnet_jax.evaluation.distances import SAMPLE_RATE, Spectra

MEL_BANDS = 40
MEL_FLOOR = -2.0
"""What is below this counts as this, 41 to 61 dB below a tone of full scale in the band.

A lower floor lets what is hardly heard decide how far sets are apart.
"""
CREPE_RATE = 16_000
CREPE_HOP = 1_600
"""A tenth of a second."""


def mel_statistics(recording: Spectra) -> np.ndarray:
    """Timbre, loudness and how fast they change: float64 `[160]`."""
    bands = recording.log_mel(2048, MEL_BANDS).astype(np.float64)  # [40, frames]
    bands = np.maximum(bands, MEL_FLOOR)
    changes = np.diff(bands, axis=1) if bands.shape[1] > 1 else np.zeros_like(bands)
    parts = (bands.mean(1), bands.std(1), np.abs(changes).mean(1), changes.std(1))
    return np.concatenate(parts)


def crepe_tiny(recording: Spectra) -> np.ndarray:
    """Which pitches sound: float64 `[512]` (CREPE: Kim et al. 2018)."""
    import torch

    torchcrepe = _torchcrepe()
    at_rate = resample(Audio(recording.audio[None], SAMPLE_RATE), CREPE_RATE)
    with torch.inference_mode():
        hidden = torchcrepe.embed(
            torch.from_numpy(at_rate.samples), CREPE_RATE, CREPE_HOP, model="tiny", batch_size=128
        )
    frames = hidden.reshape(hidden.shape[1], -1).double().numpy()
    return np.concatenate([frames.mean(0), frames.std(0)])


def check_installed(name: str) -> None:
    """Raise InputError if an embedding needs a package that is not installed."""
    if name == "crepe-tiny":
        _torchcrepe()


def _torchcrepe() -> ModuleType:
    from codec_bridge.descript import stand_in_for_broken_torchaudio

    try:
        with stand_in_for_broken_torchaudio():
            import torchcrepe
    except ImportError:
        raise InputError(
            "the embedding crepe-tiny needs torchcrepe; install vampnet-jax[evaluate]."
        ) from None
    return torchcrepe


EMBEDDINGS: dict[str, Callable[[Spectra], np.ndarray]] = {
    "mel-statistics": mel_statistics,
    "crepe-tiny": crepe_tiny,
}
"""Name → function of a recording."""
