"""A vector per recording, for distances between sets.

| name | vector | dimensions |
|---|---|---|
| `mel-statistics` | means and deviations of 40 log mel bands and of their changes | 160 |
| `crepe-tiny` | mean and deviation over time of CREPE's last hidden layer (pitch) | 512 |
| `clap` | CLAP's projection (what a caption would say), mean over pieces of at most 10 s | 512 |

The last two need the extra `evaluate`. CREPE's weights come with its package; CLAP's are
downloaded by transformers when they are first used. Compare figures only with figures of the same
embedding.
"""

import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

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
CLAP = "laion/clap-htsat-unfused"
"""On the Hugging Face hub."""


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


def clap(recording: Spectra) -> np.ndarray:
    """What a caption would say of it: float64 `[512]` (CLAP: Wu et al. 2023)."""
    import torch

    extractor, model = _clap(CLAP)
    rate = extractor.sampling_rate
    audio = resample(Audio(recording.audio[None], SAMPLE_RATE), rate).samples[0]
    pieces = np.array_split(audio, math.ceil(len(audio) / (rate * extractor.max_length_s)))
    features = extractor(pieces, sampling_rate=rate, return_tensors="pt")
    with torch.inference_mode():
        return model(**features).audio_embeds.double().numpy().mean(axis=0)


def check_installed(name: str) -> None:
    """Raise InputError if an embedding needs a package or weights that are not there."""
    if name == "crepe-tiny":
        _torchcrepe()
    if name == "clap":
        _clap(CLAP)


@functools.cache
def _clap(name_or_folder: str) -> tuple[Any, Any]:
    """CLAP's feature extractor and its half that hears."""
    from codec_bridge.descript import stand_in_for_broken_torchaudio

    try:
        with stand_in_for_broken_torchaudio(empty=False):
            from transformers import ClapAudioModelWithProjection, ClapFeatureExtractor
    except ImportError:
        raise InputError(
            "the embedding clap needs transformers; install vampnet-jax[evaluate]."
        ) from None
    try:
        model = ClapAudioModelWithProjection.from_pretrained(name_or_folder)
        return ClapFeatureExtractor.from_pretrained(name_or_folder), model.eval()
    except (OSError, ValueError) as error:
        raise InputError(
            f"the weights of CLAP, {name_or_folder}, cannot be had ({str(error).splitlines()[0]}); "
            "choose another embedding."
        ) from None


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
    "clap": clap,
}
"""Name → function of a recording."""
