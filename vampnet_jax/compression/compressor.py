"""`Compressor`: a clip to the bytes of a `.vnt` file, and back to tokens."""

import dataclasses
import functools
import hashlib
import os
import zlib

import numpy as np

from codec_bridge.errors import InputError
from vampnet_jax import pipeline
from vampnet_jax.compression import coding, container
from vampnet_jax.compression.container import Header, Probabilities
from vampnet_jax.compression.frequencies import load_frequencies
from vampnet_jax.compression.prediction import Predictor
from vampnet_jax.compression.range_coding import Decoder, Encoder
from vampnet_jax.pipeline import Clip, Edit, Progress, Variations
from vampnet_jax.prompts import Prompt
from vampnet_jax.release import Model, load, resolve


@dataclasses.dataclass(frozen=True, eq=False)
class Compressed:
    """What a file holds."""

    header: Header
    tokens: np.ndarray
    """int32 `[channels, codebooks, T]`, 0 where not kept."""
    keep: np.ndarray
    """bool `[codebooks, T]`, True = kept."""


class Compressor:
    """A model as a codec of few bits: what is kept is coded, the rest is generated again."""

    def __init__(self, model: Model, table: np.ndarray | None = None) -> None:
        """
        Args:
          model: of which both ends need the same.
          table: frequencies of its tokens, int32 `[C, V]`; without, all count as equally likely.
        """
        self.model = model
        self.n_codebooks = pipeline.n_codebooks(model)
        uniform = np.ones((self.n_codebooks, model.codec.codebook_size), np.int32)
        self.has_table = table is not None
        self.table = uniform if table is None else table

    @classmethod
    def load(
        cls, name_or_directory: str | os.PathLike = "tiny", *, codec_device: str = "auto"
    ) -> "Compressor":
        """With the model and, if it has one, its table of frequencies."""
        model = load(name_or_directory, codec_device=codec_device)
        directory = resolve(name_or_directory)
        return cls(model, load_frequencies(directory, model.codec, pipeline.n_codebooks(model)))

    @functools.cached_property
    def identity(self) -> bytes:
        """7 bytes that tell apart both stages and the table."""
        digest = hashlib.sha256()
        for stage in ("coarse", "fine"):
            digest.update(self.model.fingerprints[stage].encode())
        digest.update(self.table.astype("<i4").tobytes() if self.has_table else b"")
        return digest.digest()[:7]

    @functools.cached_property
    def predictor(self) -> Predictor:
        """The model as a source of probabilities."""
        return Predictor(self.model)

    def compress(
        self,
        clip: Clip,
        keep: np.ndarray,
        *,
        period: int = 0,
        seed: int = 0,
        with_model: bool = False,
    ) -> bytes:
        """The bytes of a `.vnt` file.

        Args:
          clip: as `pipeline.encode` returns.
          keep: bool `[codebooks, T]`, True = keep; may have fewer codebooks than the model.
          period: if above 0, `keep` is `coding.grid` of this period, which is not written then.
          seed: 0 to 2³²−1, of what is generated when the file is decompressed.
          with_model: code under the model's own probabilities instead of the table's: smaller, but
            only machines that compute alike can read it.

        Raises:
          InputError: longer or louder than a file can say.
        """
        channels, _, n_frames = clip.tokens.shape
        tokens = np.where(keep, clip.tokens[:, : len(keep)], 0).astype(np.int32)
        predictor = self.predictor if with_model else None
        plain = Probabilities.TABLE if self.has_table else Probabilities.UNIFORM
        header = Header(
            probabilities=Probabilities.MODEL if with_model else plain,
            channels=channels,
            codebooks=len(keep),
            period=period,
            codec=bytes.fromhex(self.model.codec.fingerprint)[:5],
            model=self.identity,
            arithmetic=coding.arithmetic(predictor, keep),
            seed=seed,
            n_samples=clip.n_samples,
            n_frames=n_frames,
            gain_db=clip.gain_db,
            loudness=clip.loudness,
            tokens_crc=_crc(tokens),
        )
        header.check()
        encoder = Encoder()
        if not period:
            coding.code_mask(encoder, keep)
        coding.code_tokens(encoder, tokens, keep, self.table[: len(keep)], predictor)
        return container.pack(header, encoder.payload())

    def read(self, data: bytes) -> Compressed:
        """What a file holds, its tokens decoded.

        Raises:
          InputError: not a `.vnt` file, damaged, or made with another model, codec or arithmetic.
            The sentence begins with "it".
        """
        header, payload = container.unpack(data)
        self._check(header)
        decoder = Decoder(payload)
        shape = (header.codebooks, header.n_frames)
        if header.period:
            keep = coding.grid(*shape, header.period)
        else:
            keep = coding.code_mask(decoder, np.zeros(shape, bool))
        predictor = self.predictor if header.probabilities is Probabilities.MODEL else None
        if coding.arithmetic(predictor, keep) != header.arithmetic:
            raise InputError(
                "it was coded under the model's probabilities by a machine or a version of JAX "
                "that rounds otherwise than this one; decompress it there, or compress it again "
                "without with_model."
            )
        table = self.table[: len(keep)]
        decoder.expect(coding.least_bits(header.channels, keep, table, predictor))
        unknown = np.broadcast_to(np.int32(0), (header.channels, *shape))
        tokens = coding.code_tokens(decoder, unknown, keep, table, predictor)
        if _crc(tokens) != header.tokens_crc:
            raise InputError("it is damaged: its tokens do not come out as they went in.")
        return Compressed(header, tokens, keep)

    def restore(
        self,
        content: Compressed,
        *,
        steps: int | None = None,
        on_progress: Progress | None = None,
    ) -> Variations:
        """Generate what was not kept; for `pipeline.decode`.

        Args:
          content: as `read` returns.
          steps: decoding steps of the coarse model; None is as the model is best sampled.
          on_progress: see `pipeline.Progress`.
        """
        header = content.header
        clip = Clip(content.tokens, header.n_samples, header.gain_db, header.loudness)
        return self.generate(clip, content.keep, header.seed, steps=steps, on_progress=on_progress)

    def generate(
        self,
        clip: Clip,
        keep: np.ndarray,
        seed: int,
        *,
        steps: int | None = None,
        on_progress: Progress | None = None,
    ) -> Variations:
        """What is heard of a clip of which only some tokens are kept, bool `[codebooks, T]`."""
        tokens = np.zeros((len(clip.tokens), self.n_codebooks, keep.shape[1]), np.int32)
        tokens[:, : len(keep)] = clip.tokens[:, : len(keep)]
        kept = np.pad(keep, [(0, self.n_codebooks - len(keep)), (0, 0)])
        coarse = self.model.coarse_sampling
        return pipeline.generate(
            self.model, dataclasses.replace(clip, tokens=tokens), Prompt(), seed=seed,
            coarse=coarse if steps is None else coarse.changed(steps=steps),
            edit=Edit(mask=~kept), on_progress=on_progress,
        )  # fmt: skip

    def _check(self, header: Header) -> None:
        codec = self.model.codec
        other_codec = header.codec != bytes.fromhex(codec.fingerprint)[:5]
        if other_codec or header.model != self.identity:
            raise InputError(
                f"it was made with another {'codec' if other_codec else 'model'} (it says "
                f"{header.model.hex()}, {self.model.name} is {self.identity.hex()}); give the "
                "model that it was made with."
            )
        if header.codebooks > self.n_codebooks:
            raise InputError(
                f"it keeps {header.codebooks} codebooks; the model has {self.n_codebooks}."
            )
        if (header.probabilities is Probabilities.UNIFORM and self.has_table) or (
            header.probabilities is Probabilities.TABLE and not self.has_table
        ):
            raise InputError("it is coded under other frequencies than the model has.")
        if not (header.n_frames - 1) * codec.hop_length < header.n_samples or (
            header.n_samples > header.n_frames * codec.hop_length
        ):
            raise InputError(
                f"it has {header.n_frames} frames and {header.n_samples} samples, which do not "
                "fit each other."
            )


def _crc(tokens: np.ndarray) -> int:
    return zlib.crc32(tokens.astype("<i4").tobytes())
