"""`CodecConfig`: the sizes of a codec network."""

import dataclasses
import json
import math
import reprlib
from collections.abc import Mapping
from typing import Any

from codec_bridge.errors import InputError


@dataclasses.dataclass(frozen=True)
class CodecConfig:
    """Sizes of a codec network, named as in the files of descript-audio-codec and VampNet."""

    encoder_dim: int
    encoder_rates: tuple[int, ...]
    latent_dim: int
    decoder_dim: int
    decoder_rates: tuple[int, ...]
    n_codebooks: int
    codebook_size: int
    codebook_dim: int
    sample_rate: int

    @property
    def hop_length(self) -> int:
        """Samples per frame."""
        return math.prod(self.encoder_rates)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_kwargs(cls, kwargs: Mapping[str, Any]) -> "CodecConfig":
        """Check and convert the keyword arguments kept in a codec file; others are ignored.

        Raises:
          InputError: a size is missing, not a positive integer or beyond reason, or the encoder
            and the decoder differ in their hop.
        """
        given = {name: kwargs[name] for name in _LIMITS if kwargs.get(name) is not None}
        for name, value in given.items():
            given[name] = _checked_size(name, value)
        if "latent_dim" not in given and {"encoder_dim", "encoder_rates"} <= given.keys():
            given["latent_dim"] = given["encoder_dim"] * 2 ** len(given["encoder_rates"])
        missing = [name for name in _LIMITS if name not in given]
        if missing:
            raise InputError(f"the codec's configuration lacks {', '.join(missing)}")
        config = cls(**given)
        if config.hop_length != math.prod(config.decoder_rates):
            raise InputError(
                f"the codec's encoder_rates {list(config.encoder_rates)} and decoder_rates "
                f"{list(config.decoder_rates)} must have the same product"
            )
        if config.decoder_dim % 2 ** len(config.decoder_rates):
            raise InputError(
                f"the codec's decoder_dim {config.decoder_dim} cannot be halved "
                f"{len(config.decoder_rates)} times"
            )
        return config


# Largest value of each size: far above every codec in use, low enough that a damaged or hostile
# configuration cannot ask for absurd amounts of memory.
_LIMITS = {
    "encoder_dim": 4096,
    "encoder_rates": 64,
    "latent_dim": 65536,
    "decoder_dim": 65536,
    "decoder_rates": 64,
    "n_codebooks": 256,
    "codebook_size": 65536,
    "codebook_dim": 4096,
    "sample_rate": 768_000,
}
_MAX_RATES = 10


def _checked_size(name: str, value: Any) -> int | tuple[int, ...]:
    several = name.endswith("_rates")
    if name == "codebook_dim" and isinstance(value, list | tuple) and value:
        first, *others = value
        value = (
            first if all(type(x) is int and x == first for x in others) else value
        )  # descript-audio-codec takes one width or a list of them
    sizes = list(value) if several and isinstance(value, list | tuple) else [value]
    well_formed = isinstance(value, list | tuple) and len(sizes) <= _MAX_RATES if several else True
    whole = all(isinstance(s, int) and not isinstance(s, bool) for s in sizes)
    if not (well_formed and whole and sizes and all(0 < s <= _LIMITS[name] for s in sizes)):
        form = f"a list of 1 to {_MAX_RATES} integers" if several else "an integer"
        raise InputError(
            f"the codec's {name} is {reprlib.repr(value)}; it must be {form} from 1 to "
            f"{_LIMITS[name]}"
        )
    return tuple(sizes) if several else sizes[0]
