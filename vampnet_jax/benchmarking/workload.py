"""The work that is timed: the very functions that make music, stage by stage."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from vampnet_jax import masks, placement, streaming, vamping
from vampnet_jax.benchmarking.flops import MatmulRate, sampling_flops
from vampnet_jax.benchmarking.settings import OFFICIAL, Setting, frames, load_model, random_stage
from vampnet_jax.config import ModelConfig
from vampnet_jax.model import Params, frame_features, frame_logits, position_bias
from vampnet_jax.release import Model, Stage
from vampnet_jax.sampling import SamplingOptions

PERIOD = 7
"""Every so many frames one is prompt, as in the original's preset medium-variation; speed hardly
depends on it."""

PASSES = 4
"""Forward passes that are timed together."""
FIRST_AUDIO = "first audio"
"""The stage that ends with the first piece of a stream."""
Seconds = dict[str, float]
"""By stage."""


class Workload:
    """One setting made ready: models loaded, input made; every call of `run` does all of it once.

    Stages are encode, coarse, fine, decode, everything (the four in a row) and first audio (from
    the start of `vampnet_jax.stream` until its first piece); of a transformer without a codec, that
    stage alone.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._model: Model | None = None
        self._windows: dict[str, int]
        self._stages: dict[str, Stage]
        self.sampling: dict[str, SamplingOptions]
        """How each stage is sampled."""
        with self._device():
            if setting.config is None:
                model = load_model(setting)
                if setting.mesh is not None:
                    model = placement.divide(model, self._mesh(model.coarse.config))
                self._model = model
                self._stages = {"coarse": model.coarse, "fine": model.fine}
                own = {"coarse": model.coarse_sampling, "fine": model.fine_sampling}
                self._windows = {"coarse": model.coarse_window, "fine": model.fine_window}
                self._prepare_audio(model)
            else:
                stage, window = random_stage(setting)
                if setting.mesh is not None:
                    stage = placement.divide_stage(stage, self._mesh(stage.config))
                self._stages = {setting.config: stage}
                own = {setting.config: OFFICIAL[setting.config].sampling}
                self._windows = {setting.config: window}
                self.n_frames, self.audio_seconds = frames(setting.seconds), setting.seconds
            self.sampling = {name: setting.sampling(name, options) for name, options in own.items()}
            self._forwards = {
                name: _Forward(stage, self._rows(name), self._length(name), self.sampling[name])
                for name, stage in self._stages.items()
            }
            self._rates = {
                name: MatmulRate(stage.config, self._rows(name) * self._length(name))
                for name, stage in self._stages.items()
            }

    @property
    def codec_device(self) -> str | None:
        """Where the codec computes; None if there is none."""
        return None if self._model is None else str(self._model.codec._torch_device)

    @property
    def devices(self) -> list[jax.Device]:
        """Those that the transformers compute on."""
        some = jax.tree.leaves(next(iter(self._stages.values())).params)[0]
        return sorted(some.devices(), key=lambda device: device.id)

    def configs(self) -> dict[str, ModelConfig]:
        """Dimensions of the transformers by stage."""
        return {name: stage.config for name, stage in self._stages.items()}

    def tokens(self) -> dict[str, int]:
        """Tokens of the codebooks that each stage predicts, over the batch."""
        return {
            name: self.setting.batch * self.n_frames * stage.config.n_predicted_codebooks
            for name, stage in self._stages.items()
        }

    def flops(self) -> dict[str, int]:
        """Model FLOPs of each stage: all windows, their overlap included, and all steps.

        Not of a stage whose steps are as many as the music needs (entropy_bound).
        """
        return {
            name: self.setting.batch
            * len(self._starts(name))
            * sampling_flops(
                stage.config, self.sampling[name], min(self.n_frames, self._windows[name])
            )
            for name, stage in self._stages.items()
            if self.sampling[name].entropy_bound is None
        }

    def run(self, seed: int) -> Seconds:
        """Do everything once."""
        with self._device():
            if self._model is None:
                (name,) = self._stages
                return {name: self._run_stage(name, seed)}
            return self._run_all(self._model, seed)

    def forward(self) -> Seconds:
        """The transformer's share of each stage: as many forward passes as the stage has."""
        with self._device():
            return {
                name: forward() * self._groups(name) for name, forward in self._forwards.items()
            }

    def matmul_rates(self) -> dict[str, float]:
        """FLOP/s of products shaped like those of each stage's transformer, on one device."""
        with self._device():
            return {name: rate() for name, rate in self._rates.items()}

    def _run_all(self, model: Model, seed: int) -> Seconds:
        clock = [time.perf_counter()]
        laps: Seconds = {}

        def lap(stage: str) -> None:
            clock.append(time.perf_counter())
            laps[stage] = clock[-1] - clock[-2]

        def on_progress(stage: str, done: int, total: int) -> None:
            if stage == "coarse" and done == total:
                lap("coarse")

        tokens = model.codec.encode(self._audio)[:, : self._mask.shape[1]]
        lap("encode")
        made = vamping.vamp(
            model,
            tokens,
            self._mask,
            jax.random.key(seed),
            **self.sampling,
            on_progress=on_progress,
        )
        lap("fine")
        np.asarray(model.codec.decode(made))
        lap("decode")
        laps["everything"] = clock[-1] - clock[0]
        before = time.perf_counter()
        pieces = streaming.stream(
            model, self._audio, self._mask, jax.random.key(seed), **self.sampling
        )
        next(pieces)
        laps[FIRST_AUDIO] = time.perf_counter() - before
        return laps

    def _run_stage(self, name: str, seed: int) -> float:
        stage, window = self._stages[name], self._windows[name]
        config = stage.config
        shape = (self.setting.batch, config.n_codebooks, self.n_frames)
        tokens = np.random.default_rng(seed).integers(0, config.vocab_size, shape, np.int32)
        mask = np.array(masks.periodic(shape, PERIOD))
        mask[:, : config.n_conditioning_codebooks] = False
        keys = jax.random.split(jax.random.key(seed), self.setting.batch)
        starts = self._starts(name)
        passes = [[s] for s in starts]
        if name == "fine":
            passes = self._fine_passes()
        before = time.perf_counter()
        options = self.sampling[name]
        vamping.fill(stage, tokens, mask, keys, options, passes, window, lambda count: None)
        return time.perf_counter() - before

    def _prepare_audio(self, model: Model) -> None:
        codec, setting = model.codec, self.setting
        n_samples = round(setting.seconds * codec.sample_rate)
        rng = np.random.default_rng(0)
        self._audio = rng.normal(0, 0.1, (setting.batch, n_samples)).astype(np.float32)
        self.n_frames = codec.n_frames(n_samples)
        self.audio_seconds = n_samples / codec.sample_rate
        shape = (setting.batch, model.fine.config.n_codebooks, self.n_frames)
        self._mask = jnp.asarray(masks.periodic(shape, PERIOD))

    def _starts(self, stage: str) -> list[int]:
        return vamping.window_starts(self.n_frames, self._windows[stage])

    def _length(self, stage: str) -> int:
        """Frames that the transformer reads at once."""
        window = self._windows[stage]
        return vamping.bucket(min(self.n_frames, window), window)

    def _rows(self, stage: str) -> int:
        """Windows that it reads at once, at most."""
        together = [1] if stage == "coarse" else map(len, self._fine_passes())
        params = self._stages[stage].params
        rows = min(max(together) * self.setting.batch, vamping.rows_at_once(params))
        return rows + -rows % placement.batch_shards(params)

    def _groups(self, stage: str) -> float:
        """How many batches of `_rows` windows the stage takes."""
        return len(self._starts(stage)) * self.setting.batch / self._rows(stage)

    def _fine_passes(self) -> list[list[int]]:
        return vamping.independent(self._starts("fine"), self._windows["fine"])

    def _mesh(self, config: ModelConfig) -> jax.sharding.Mesh:
        assert self.setting.mesh is not None
        return placement.mesh_of(self.setting.mesh, config, self.setting.found_devices)

    @contextlib.contextmanager
    def _device(self) -> Iterator[None]:
        """Compute on the setting's device, whatever the process computes on otherwise."""
        with jax.default_device(self.setting.found_device):
            yield


class _Forward:
    """The transformer of a stage alone, on a batch as the sampler gives it."""

    def __init__(self, stage: Stage, rows: int, length: int, options: SamplingOptions) -> None:
        config, guided = stage.config, options.guidance is not None
        codebook = None if options.codebook_steps is None else 0
        self._passes = options.total_steps + guided
        shape = (rows, config.n_codebooks, length)
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape, np.int32)
        self._tokens = placement.beside(stage.params, jnp.asarray(tokens))
        self._params = stage.params
        self._bias = jax.jit(functools.partial(position_bias, n_frames=length, config=config))(
            stage.params
        )

        @jax.jit
        def forward(params: Params, tokens: jax.Array, bias: jax.Array) -> jax.Array:
            # The largest logit stands for all, so that they need not be written out.
            features = frame_features(params, tokens, config, bias=bias)
            logits = frame_logits(params, features, config, codebook)
            if guided:
                logits = logits - frame_logits(params, 2 * features, config, codebook)
            return jnp.max(logits)

        self._forward: Callable[..., jax.Array] = forward

    def __call__(self) -> float:
        """Seconds of the passes of a batch of windows, from the mean of some; first it compiles."""
        one = self._forward(self._params, self._tokens, self._bias)
        jax.block_until_ready(one)  # the first after other work is slower; a stage has many
        before = time.perf_counter()
        # Started together, so that an accelerator does not wait for Python as it would for one.
        passes = [self._forward(self._params, self._tokens, self._bias) for _ in range(PASSES)]
        jax.block_until_ready(passes)
        return self._passes * (time.perf_counter() - before) / PASSES
