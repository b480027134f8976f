"""`Codec`: audio to tokens and back, for audio of any length in constant memory."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from codec_bridge.config import CodecConfig
from codec_bridge.errors import InputError
from codec_bridge.hashes import fingerprint
from codec_bridge.network import (
    KINDS,
    build_network,
    check_names_and_shapes,
    convolutions,
)
from codec_bridge.receptive_field import Convolution, inputs_needed, output_length

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda")
CHUNK_SECONDS = 10.0

Progress = Callable[[int, int], None]  # called with the frames done and the frames in all


class _Path(NamedTuple):
    """A network's one way through its convolutions, and the network itself."""

    module: Any
    chain: tuple[Convolution, ...]


class Codec:
    """A neural audio codec: DAC of descript-audio-codec, or LAC of the original VampNet.

    Attributes:
      kind: "dac" or "lac".
      config: sizes of the network.
      tensors: float32 weights by name, weight normalisation folded; not to be changed.
      device: "cpu", "cuda", or "auto" for CUDA where PyTorch has it; the network's device.
      chunk_seconds: how much audio is in the network at a time, over all rows of a batch, apart
        from the context around it. It bounds the memory and does not change the results.

    PyTorch is imported, and the network built, by the first `encode` or `decode`.
    """

    def __init__(
        self,
        kind: str,
        config: CodecConfig,
        tensors: Mapping[str, np.ndarray],
        *,
        device: str = "auto",
        chunk_seconds: float = CHUNK_SECONDS,
    ):
        if kind not in KINDS:
            raise InputError(f"a codec's kind is one of {', '.join(KINDS)}, not {kind!r}")
        if device not in DEVICES:
            raise InputError(f"a codec's device is one of {', '.join(DEVICES)}, not {device!r}")
        self.kind = kind
        self.config = config
        self.tensors = dict(tensors)
        self.device = device
        self.chunk_seconds = _positive(chunk_seconds)
        self.codebooks = _codebooks(config, self.tensors)

    def __repr__(self) -> str:
        return (
            f"<Codec {self.kind}, {self.sample_rate} Hz, hop {self.hop_length}, "
            f"{self.n_codebooks} codebooks of {self.codebook_size}>"
        )

    @property
    def sample_rate(self) -> int:
        """Samples per second, in Hz."""
        return self.config.sample_rate

    @property
    def hop_length(self) -> int:
        """Samples per frame."""
        return self.config.hop_length

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.sample_rate / self.hop_length

    @property
    def n_codebooks(self) -> int:
        return self.config.n_codebooks

    @property
    def codebook_size(self) -> int:
        return self.config.codebook_size

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identity of the weights: see `codec_bridge.hashes.fingerprint`."""
        return fingerprint(self.tensors)

    def n_frames(self, n_samples: int) -> int:
        """T, the frames that `encode` makes of so many samples."""
        return output_length(
            self._encoder.chain, -(-n_samples // self.hop_length) * self.hop_length
        )

    @property
    def encoder_context(self) -> tuple[int, int]:
        """Frames of audio before and after a frame on which its tokens depend."""
        first, last = inputs_needed(self._encoder.chain, 0, 1)
        return -(first // self.hop_length), max(0, -(-last // self.hop_length) - 1)

    @property
    def decoder_context(self) -> tuple[int, int]:
        """Frames of tokens before and after a frame on which its audio depends."""
        first, last = inputs_needed(self._decoder.chain, 0, self.hop_length)
        return -first, last - 1

    def encode(
        self,
        audio: np.ndarray | jax.Array,
        *,
        chunk_seconds: float | None = None,
        progress: Progress | None = None,
    ) -> jax.Array:
        """Turn audio into tokens.

        Args:
          audio: float [B, samples] at `sample_rate`; channels of a recording are rows.
          chunk_seconds: overrides the codec's own.
          progress: called with (frames done, frames in all).

        Returns:
          int32 [B, C, T], T = ⌈samples / hop_length⌉: the audio is padded with zeros on the right.
          (A LAC whose strides are odd gives the fewer frames that its convolutions give.)

        Raises:
          InputError: wrong shape, no samples, or samples that are not finite.
        """
        _check_audio(audio)
        rows, samples = audio.shape
        if rows == 0:
            return jnp.zeros((0, self.n_codebooks, -(-samples // self.hop_length)), jnp.int32)
        import torch

        encoder = self._encoder
        source = _to_torch(audio if audio.dtype == np.float32 else np.asarray(audio, np.float32))
        padded = -(-samples // self.hop_length) * self.hop_length
        frames = output_length(encoder.chain, padded)
        if frames == 0:
            raise InputError(f"{samples} samples are too short for this codec")
        tokens = torch.empty(rows, self.n_codebooks, frames, dtype=torch.int32)

        def run(row: slice, start: int, stop: int) -> None:
            first, last = inputs_needed(encoder.chain, start, stop)
            first = max(first, 0) // self.hop_length * self.hop_length
            last = min(-(-last // self.hop_length) * self.hop_length, padded)
            chunk = source[row, first : min(last, samples)].to(self._torch_device)
            chunk = torch.nn.functional.pad(chunk, (0, last - first - chunk.shape[1]))
            latents = encoder.module(chunk[:, None])
            skipped = first // self.hop_length
            chosen = self._network.quantizer(latents[..., start - skipped : stop - skipped])[1]
            tokens[row, :, start:stop] = chosen.to("cpu", torch.int32)

        self._in_chunks(run, rows, frames, chunk_seconds, progress)
        return _to_jax(tokens)

    def decode(
        self,
        tokens: np.ndarray | jax.Array,
        *,
        chunk_seconds: float | None = None,
        progress: Progress | None = None,
    ) -> jax.Array:
        """Turn tokens into audio.

        Args:
          tokens: integers [B, C, T] in 0 … codebook_size − 1. C may be less than `n_codebooks`:
            the first C codebooks alone give a coarser sound.
          chunk_seconds: overrides the codec's own.
          progress: called with (frames done, frames in all).

        Returns:
          float32 [B, T · hop_length]. Where the network gives fewer samples (DAC with odd
          strides: a few), zeros follow; where it gives more, they are cut off.

        Raises:
          InputError: wrong shape, or tokens out of range (such as ones that are still masked).
        """
        chosen = _check_tokens(tokens, self.n_codebooks, self.codebook_size)
        rows, _, frames = chosen.shape
        if rows == 0 or frames == 0:
            return jnp.zeros((rows, frames * self.hop_length), jnp.float32)
        import torch

        decoder = self._decoder
        source = _to_torch(chosen)
        samples = frames * self.hop_length
        given = min(output_length(decoder.chain, frames), samples)
        audio = torch.zeros(rows, samples, dtype=torch.float32)

        def run(row: slice, start: int, stop: int) -> None:
            begin, end = start * self.hop_length, min(stop * self.hop_length, given)
            if begin >= end:
                return
            first, last = inputs_needed(decoder.chain, begin, end)
            first, last = max(first, 0), min(last, frames)
            chunk = source[row, :, first:last].to(self._torch_device, torch.int64)
            sound = decoder.module(self._network.quantizer.from_codes(chunk)[0])
            skipped = first * self.hop_length
            audio[row, begin:end] = sound[:, 0, begin - skipped : end - skipped].to("cpu")

        self._in_chunks(run, rows, frames, chunk_seconds, progress)
        return _to_jax(audio)

    def _in_chunks(
        self,
        run: Callable[[slice, int, int], None],
        rows: int,
        frames: int,
        chunk_seconds: float | None,
        progress: Progress | None,
    ) -> None:
        import torch

        seconds = self.chunk_seconds if chunk_seconds is None else _positive(chunk_seconds)
        limit = max(1, int(seconds * self.frame_rate))
        rows_at_once = max(1, limit // frames)
        # TF32 would flip tokens whose margin is small. Left out, `enabled` is False.
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with torch.inference_mode(), exact:
            for row in range(0, rows, rows_at_once):
                some = slice(row, min(row + rows_at_once, rows))
                for start in range(0, frames, limit):
                    stop = min(start + limit, frames)
                    run(some, start, stop)
                    if progress is not None:
                        done = some.start * frames + (some.stop - some.start) * stop
                        progress(done, rows * frames)

    @functools.cached_property
    def _torch_device(self) -> "torch.device":
        import torch

        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError("the codec was asked to run on cuda, which PyTorch does not have here")
        cuda = self.device != "cpu" and torch.cuda.is_available()
        return torch.device("cuda" if cuda else "cpu")

    @functools.cached_property
    def _network(self) -> Any:
        return build_network(self.kind, self.config, self.tensors).to(self._torch_device)

    @functools.cached_property
    def _encoder(self) -> _Path:
        return _Path(self._network.encoder, tuple(convolutions(self._network.encoder)))

    @functools.cached_property
    def _decoder(self) -> _Path:
        return _Path(self._network.decoder, tuple(convolutions(self._network.decoder)))


def _codebooks(config: CodecConfig, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """The codebooks' rows as they are, float32 [C, V, d]."""
    names = [f"quantizer.quantizers.{c}.codebook.weight" for c in range(config.n_codebooks)]
    shape = (config.codebook_size, config.codebook_dim)
    check_names_and_shapes(
        {name: tensors[name].shape for name in names if name in tensors},
        dict.fromkeys(names, shape),
    )
    return np.stack([tensors[name] for name in names])


def _positive(seconds: float) -> float:
    if not (math.isfinite(seconds) and seconds > 0):
        raise InputError(f"the codec's chunk_seconds is {seconds}; it must be above 0")
    return float(seconds)


def _check_audio(audio: np.ndarray | jax.Array) -> None:
    if audio.ndim != 2:
        raise InputError(f"audio has shape {list(audio.shape)}; [rows, samples] is needed")
    if audio.shape[1] == 0:
        raise InputError("the audio has no samples")
    if not jnp.issubdtype(audio.dtype, jnp.floating):
        raise InputError(f"audio samples are {audio.dtype}; floating-point samples are needed")
    if not np.isfinite(np.asarray(audio)).all():
        raise InputError("the audio has samples that are not finite (NaN or infinity)")


def _check_tokens(
    tokens: np.ndarray | jax.Array, n_codebooks: int, codebook_size: int
) -> np.ndarray:
    if tokens.ndim != 3 or not 1 <= tokens.shape[1] <= n_codebooks:
        raise InputError(
            f"tokens have shape {list(tokens.shape)}; [rows, codebooks, frames] with 1 to "
            f"{n_codebooks} codebooks is needed"
        )
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise InputError(f"tokens are {tokens.dtype}; integers are needed")
    values = np.asarray(tokens)
    if values.size and not 0 <= int(values.min()) <= int(values.max()) < codebook_size:
        raise InputError(
            f"tokens go from {values.min()} to {values.max()}; this codec has 0 to "
            f"{codebook_size - 1}, and masked tokens must be generated first"
        )
    return values.astype(np.int32, copy=False)


def _to_torch(array: np.ndarray | jax.Array) -> "torch.Tensor":
    """The same memory as a tensor on the CPU; copied only if it is elsewhere or read-only."""
    import torch

    if not (isinstance(array, jax.Array) and _on_one_cpu(array)):
        array = np.require(array, requirements=["C", "W"])  # NumPy 2.0 shares no read-only memory
    return torch.from_dlpack(array)


def _to_jax(tensor: "torch.Tensor") -> jax.Array:
    """The same memory as a JAX array where JAX computes on the CPU, else moved to its device."""
    if jax.default_backend() == "cpu":
        return jax.dlpack.from_dlpack(tensor)
    return jnp.asarray(tensor.numpy())


def _on_one_cpu(array: jax.Array) -> bool:
    devices = array.devices()
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"
