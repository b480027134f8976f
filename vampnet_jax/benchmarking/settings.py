"""What is measured: a setting, checked, and the models that it needs."""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from codec_bridge.errors import InputError
from vampnet_jax.config import Dtype, ModelConfig
from vampnet_jax.model import init
from vampnet_jax.pipeline import MIN_SECONDS
from vampnet_jax.release import Model, Stage, load
from vampnet_jax.sampling import COARSE_DEFAULTS, FINE_DEFAULTS, SamplingOptions

Off = Literal["off"]
MAX_SECONDS = 3600


class Published(NamedTuple):
    """One of the published transformers (VampNet, section 4)."""

    config: ModelConfig
    seconds: float
    """Read at once."""
    sampling: SamplingOptions


OFFICIAL = {
    "coarse": Published(ModelConfig(n_codebooks=4, dropout=0.0), 10.0, COARSE_DEFAULTS),
    "fine": Published(
        ModelConfig(n_codebooks=14, n_conditioning_codebooks=4, n_layers=16, dropout=0.0),
        3.0,
        FINE_DEFAULTS,
    ),
}
OFFICIAL_FRAME_RATE = 44100 / 768


@dataclasses.dataclass(frozen=True)
class Setting:
    """One point of a benchmark."""

    model: str = "tiny"
    """Name or directory."""
    config: Literal["coarse", "fine"] | None = None
    """Instead of a model: one transformer of the published size with random weights."""
    device: str = "auto"
    """auto, cpu, gpu or tpu."""
    mesh: str | None = None
    """Sizes of the axes of a mesh of devices, such as data=2,tensor=2; None: one device."""
    batch: int = 1
    seconds: float = 10.0
    steps: int | None = None
    """Of the coarse model; None: as the model is best sampled."""
    fine_steps: int | None = None
    dtype: Dtype | None = None
    """None: as the model says."""
    attention: Literal["xla", "cudnn"] | None = None
    """None: as the model says."""
    typical_mass: float | Off | None = None
    """Filters of both stages; None: as the model is best sampled."""
    top_k: int | Off | None = None
    top_p: float | Off | None = None
    order: Literal["confidence", "spread"] | None = None
    """Of both stages; None: as the model is best sampled."""
    guidance: float | Off | None = None

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise InputError(f"--batch is {self.batch}; it must be at least 1.")
        if not MIN_SECONDS <= self.seconds <= MAX_SECONDS:
            raise InputError(
                f"--seconds is {self.seconds:g}; it must be from {MIN_SECONDS:g} to {MAX_SECONDS}."
            )
        for option, steps in (("--steps", self.steps), ("--fine-steps", self.fine_steps)):
            if steps is not None and steps < 1:
                raise InputError(f"{option} is {steps}; it must be a whole number of at least 1.")
        try:
            self.sampling("coarse", COARSE_DEFAULTS)
        except InputError as error:
            raise InputError(f"--{error}".replace("_", "-")) from None

    def sampling(self, stage: str, default: SamplingOptions) -> SamplingOptions:
        """How a stage is sampled, given how its model is best sampled."""
        changes: dict[str, Any] = {
            name: None if value == "off" else value
            for name in ("typical_mass", "top_k", "top_p", "order", "guidance")
            if (value := getattr(self, name)) is not None
        }
        steps = self.steps if stage == "coarse" else self.fine_steps
        if steps is not None:
            changes["steps"] = steps
        return default.changed(**changes)

    def computing(self, config: ModelConfig) -> ModelConfig:
        """A model's dimensions with this setting's dtype and attention.

        Raises:
          InputError: they do not go together, or the device does not have them.
        """
        changes = {
            name: value
            for name in ("dtype", "attention")
            if (value := getattr(self, name)) is not None
        }
        config = dataclasses.replace(config, **changes)
        if config.attention == "cudnn" and self.found_device.platform != "gpu":
            raise InputError(
                f"cuDNN attention needs an NVIDIA GPU, and this is a {self.found_device.platform}; "
                "use --attention xla."
            )
        return config

    @property
    def found_device(self) -> jax.Device:
        """The first device of the kind.

        Raises:
          InputError: there is none.
        """
        return self.found_devices[0]

    @property
    def found_devices(self) -> list[jax.Device]:
        """All devices of the kind."""
        if self.device == "auto":
            return jax.devices()
        try:
            return jax.devices(self.device)
        except RuntimeError:
            raise InputError(
                f"--device {self.device}: JAX finds no {self.device.upper()} here; install the "
                "extra for it or use --device cpu."
            ) from None

    def describe(self) -> str:
        """In a few words."""
        name = f"official {self.config}, random weights" if self.config else self.model
        parts = [name, f"{self.seconds:g} s", f"batch {self.batch}"]
        parts += [f"{self.steps} steps"] if self.steps else []
        parts += [f"{self.fine_steps} fine steps"] if self.fine_steps else []
        parts += [value for value in (self.dtype, self.attention) if value]
        for option in ("mesh", "typical_mass", "top_k", "top_p", "order", "guidance"):
            value = getattr(self, option)
            parts += [f"{option.replace('_', '-')} {value}"] if value is not None else []
        parts += [f"on {self.device}"] if self.device != "auto" else []
        return ", ".join(parts)


def load_model(setting: Setting) -> Model:
    """The setting's model, computing as the setting says."""
    model = load(setting.model)
    coarse, fine = (
        stage._replace(config=setting.computing(stage.config))
        for stage in (model.coarse, model.fine)
    )
    if setting.device == "cpu":
        model.codec.device = "cpu"
    return dataclasses.replace(model, coarse=coarse, fine=fine)


def random_stage(setting: Setting) -> tuple[Stage, int]:
    """A transformer of the published size with random weights, and its window in frames."""
    assert setting.config is not None
    published = OFFICIAL[setting.config]
    config = setting.computing(published.config)
    shape = (config.n_codebooks, config.vocab_size, config.latent_dim)
    codebooks = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    make = jax.jit(init, static_argnums=1)
    return Stage(make(jax.random.key(0), config, codebooks), config), frames(published.seconds)


def frames(seconds: float, rate: float = OFFICIAL_FRAME_RATE) -> int:
    """Frames of so much audio at a codec's frames/s; a part of one counts."""
    return math.ceil(round(seconds * rate, 6))
