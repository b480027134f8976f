"""Sounds and pictures from a run under way, for TensorBoard.

The excerpts, masks and random draws are the same every time, so what changes is the model.
"""

import dataclasses
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

import codec_bridge
from codec_bridge.errors import InputError
from vampnet_jax import masks, release
from vampnet_jax.figures import draw_variation
from vampnet_jax.model import Params, to_device
from vampnet_jax.sampling import COARSE_DEFAULTS, FINE_DEFAULTS, generate
from vampnet_jax.training.config import TrainConfig
from vampnet_jax.training.excerpts import fixed_excerpts
from vampnet_jax.training.initial import load_stage
from vampnet_jax.training.log import RunLog
from vampnet_jax.training.tokens import CodecInfo, TrackReader
from vampnet_jax.vamping import vamp

EXCERPTS = 2
PERIOD = 7
"""Frames of the periodic prompt."""


@dataclasses.dataclass(frozen=True)
class ListeningOptions:
    """What turns the tokens of a run into sound."""

    codec: str | None = None
    """A codec file, or a model (name or directory) whose codec it is."""
    fine_model: str | None = None
    """A fine run or a model, which adds the other codebooks to a coarse run's; None decodes the
    coarse codebooks alone."""


class Listening:
    """Makes sounds and pictures of held-out excerpts.

    `reconstruction` (the excerpt's own tokens, once), `inpainting` (its first and last quarter are
    kept), `periodic` (every 7th frame is kept) and `from nothing`. A fine model is given the
    conditioning codebooks whole.

    Args:
      options: see there.
      config: of the run.
      reader: the held-out tracks, at least `window` frames long.
      window: frames per excerpt.

    Raises:
      InputError: no or another codec, or a fine model that does not go with the coarse one.
    """

    def __init__(
        self, options: ListeningOptions, config: TrainConfig, reader: TrackReader, window: int
    ) -> None:
        self.config = config.model
        self.window = window
        self.codec = load_codec(options.codec, reader.manifest.codec)
        self.fine = None
        n_codebooks = self.config.n_codebooks
        if options.fine_model is not None:
            if self.config.n_conditioning_codebooks:
                raise InputError("fine_model is for listening to a coarse run; this one is fine.")
            fine = load_stage(options.fine_model, "fine")
            self.fine = fine._replace(params=to_device(fine.params))
            n_codebooks = fine.config.n_codebooks
            if fine.config.n_conditioning_codebooks != self.config.n_codebooks:
                raise InputError(
                    f"{options.fine_model} is given {fine.config.n_conditioning_codebooks} "
                    f"codebooks and this run makes {self.config.n_codebooks}; they do not belong "
                    "together."
                )
            spoken = fine.params["embedding"]["codebooks"]
            if not np.array_equal(spoken, np.asarray(self.codec.codebooks)[: len(spoken)]):
                raise InputError(
                    f"{options.fine_model} speaks the tokens of another codec than {options.codec}."
                )
        self.tokens = fixed_excerpts(reader, n_codebooks, window, EXCERPTS)[0][:EXCERPTS]
        shape = self.tokens.shape
        self.prompts = {
            "inpainting": masks.inpaint(shape, window // 4, window // 4),
            "periodic": masks.periodic(shape, PERIOD),
            "from nothing": masks.full(shape),
        }
        self.truth: np.ndarray | None = None

    def listen(self, step: int, params: Params, log: RunLog) -> None:
        """Make everything and keep it in the log.

        Args:
          step: of the run.
          params: as `vampnet_jax.apply` takes them, on one device.
          log: where to.
        """
        if self.truth is None:
            self.truth = self._decode(self.tokens)
            for number, audio in enumerate(self.truth, start=1):
                log.write_audio(step, f"reconstruction/{number}", audio, self.codec.sample_rate)
        for name, mask in self.prompts.items():
            made = self._generate(params, mask)
            kept = np.asarray(mask) & (
                np.arange(self.tokens.shape[1])[:, None] >= self.config.n_conditioning_codebooks
            )
            for number, audio in enumerate(self._decode(made), start=1):
                tag = f"{name}/{number}"
                log.write_audio(step, tag, audio, self.codec.sample_rate)
                picture = self._draw(f"step {step}: {tag}", number - 1, kept, audio)
                log.write_picture(step, tag, picture)

    def _generate(self, params: Params, mask: jax.Array) -> np.ndarray:
        tokens, key = jnp.asarray(self.tokens), jax.random.key(0)
        if self.fine is None:
            fine = self.config.n_conditioning_codebooks > 0
            options = FINE_DEFAULTS if fine else COARSE_DEFAULTS
            return np.asarray(generate(params, tokens, mask, key, self.config, options))
        model = release.Model(
            coarse=release.Stage(params, self.config),
            fine=release.Stage(self.fine.params, self.fine.config),
            codec=self.codec,
            coarse_window=self.window,
            fine_window=self.fine.window,
        )
        return np.asarray(vamp(model, tokens, mask, key))

    def _decode(self, tokens: np.ndarray) -> np.ndarray:
        return np.clip(np.asarray(self.codec.decode(tokens)), -1, 1)

    def _draw(self, title: str, row: int, mask: np.ndarray, audio: np.ndarray) -> bytes:
        assert self.truth is not None
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "picture.png"
            draw_variation(
                path,
                title=title,
                tokens=self.tokens[row],
                mask=mask[row],
                frame_rate=self.codec.sample_rate / self.codec.hop_length,
                before=self.truth[row],
                after=audio,
                sample_rate=self.codec.sample_rate,
            )
            return path.read_bytes()


def load_codec(source: str | None, wanted: CodecInfo) -> codec_bridge.Codec:
    """The codec that made a run's tokens.

    Raises:
      InputError: none is named, or it is another.
    """
    if source is None:
        raise InputError("listen_every needs the codec that made the tokens; name that codec too.")
    codec = release.find_codec(source)
    if codec.fingerprint != wanted.fingerprint:
        raise InputError(
            f"{source} is not the codec that made the tokens ({codec.fingerprint[:12]}… and "
            f"{wanted.fingerprint[:12]}…)."
        )
    return codec


def on_one_device(params: Params) -> Params:
    """Sharded parameters, whole; with several processes all must call this."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(params, tiled=True)
    return jax.device_put(params, jax.local_devices()[0])
