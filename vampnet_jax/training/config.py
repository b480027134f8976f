"""Every number of a training run, and the presets."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from codec_bridge.errors import InputError
from vampnet_jax.config import ModelConfig
from vampnet_jax.lora import LoraConfig

Stage = Literal["coarse", "fine"]
Preset = Literal["tiny", "small", "base", "coarse", "fine"]
ScheduleName = Literal["noam", "cosine", "constant"]
SourceWeights = tuple[tuple[str, float], ...]
NO_END = "Training would never end: give steps, minutes or both."


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A run's settings, hashable, so static under jit. The defaults are VampNet's recipe."""

    model: ModelConfig
    lora: LoraConfig | None = None
    """Train low-rank adapters of a model that stays as it is; None trains all parameters."""
    seed: int = 0
    """Decides initial parameters, excerpts, masks and dropout."""
    batch_size: int = 25
    """Examples per step, over all devices."""
    accumulate: int = 1
    """Equal parts that a batch is computed in, one after the other: less memory, the same step."""
    window_seconds: float = 10.0
    """Length of an excerpt."""
    min_loudness: float = -30.0
    """LUFS; quieter excerpts are drawn again."""
    source_weights: SourceWeights = ()
    """(source, how many times as often its music comes as by its length); 0 leaves it out."""
    steps: int | None = None
    """Stop after so many steps."""
    minutes: float | None = None
    """Stop after so many minutes of training (validation included)."""
    schedule: ScheduleName = "noam"
    learning_rate: float = 2.0
    """Peak of cosine and constant schedules; the factor of noam."""
    warmup_steps: int = 10_000
    weight_decay: float = 0.01
    adam_b1: float = 0.9
    adam_b2: float = 0.999
    gradient_clip: float = 5.0
    """Global norm that gradients are clipped to."""
    level_masks: float = 0.0
    """Share of the examples that are masked as when codebooks are filled in one after the other."""
    prompt_masks: float = 0.0
    """Share of the examples that are masked as while a periodic prompt is filled in."""
    label_smoothing: float = 0.1
    ema_decay: float = 0.999
    """Of the moving average of the weights that is used afterwards; 0 keeps none."""
    log_every: int = 20
    """Steps between lines of the log."""
    validate_every: int = 1000
    """Steps between validations; each saves a checkpoint."""
    validation_excerpts: int = 64
    save_every: int = 0
    """Steps between checkpoints, besides those of validations; 0 saves no others."""
    save_minutes: float = 10.0
    """A checkpoint is also saved after so many minutes without one."""
    keep: int = 2
    """Newest checkpoints kept, besides the best."""
    milestone_every: int = 0
    """Checkpoints of multiples of this step are saved and kept for good; 0 keeps none."""
    skip_spikes: float = 0.0
    """Skip steps whose gradient is not finite or so many times as large as usual; 0: none."""
    listen_every: int = 0
    """Steps between sounds and pictures for TensorBoard; 0 makes none."""

    def __post_init__(self) -> None:
        at_least = {
            "batch_size": 1,
            "accumulate": 1,
            "warmup_steps": 0,
            "log_every": 1,
            "validate_every": 1,
            "validation_excerpts": 1,
            "keep": 1,
            "save_every": 0,
            "milestone_every": 0,
            "listen_every": 0,
            "seed": 0,
        }
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        if self.batch_size % self.accumulate:
            raise InputError(
                f"batch_size {self.batch_size} cannot be accumulated in {self.accumulate} equal "
                "parts; choose a multiple."
            )
        above_zero = ("window_seconds", "learning_rate", "gradient_clip", "save_minutes")
        for name in above_zero:
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}; it must be above 0.")
        for name in ("label_smoothing", "ema_decay", "adam_b1", "adam_b2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be from 0 to below 1.")
        if not 0 <= self.weight_decay < math.inf:
            raise InputError(f"weight_decay is {self.weight_decay}; it must not be negative.")
        for name in ("level_masks", "prompt_masks"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be from 0 to 1.")
        if self.level_masks + self.prompt_masks > 1:
            raise InputError(
                f"level_masks is {self.level_masks} and prompt_masks {self.prompt_masks}; together "
                "they can be 1 at most."
            )
        if self.seed >= 2**63:
            raise InputError(f"seed is {self.seed}; it must be below 2^63.")
        if self.schedule not in get_args(ScheduleName):
            raise InputError(f"schedule is {self.schedule!r}; choose noam, cosine or constant.")
        if self.steps is None and self.minutes is None:
            raise InputError(NO_END)
        for name in ("steps", "minutes"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must be above 0.")
        if self.model.attention == "cudnn" and self.model.dropout > 0:
            raise InputError(
                f"dropout is {self.model.dropout:g}, and cuDNN attention has none on its weights; "
                "set it to 0, or attention to xla."
            )
        if self.skip_spikes and not 1 < self.skip_spikes < math.inf:
            raise InputError(
                f"skip_spikes is {self.skip_spikes}; it must be above 1, or 0 for off."
            )

    def done(self, step: int, seconds: float) -> float:
        """Share of the run that is done, by steps or by time, whichever is further."""
        shares = [0.0]
        if self.steps is not None:
            shares.append(step / self.steps)
        if self.minutes is not None:
            shares.append(seconds / (60 * self.minutes))
        return max(shares)

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "TrainConfig":
        """The inverse of `to_dict`.

        Raises:
          InputError: fields are missing or unknown.
        """
        try:
            model = ModelConfig(**content["model"])
            adapters = content.get("lora")
            if adapters is not None:
                adapters = LoraConfig(**{**adapters, "targets": tuple(adapters["targets"])})
            weights = tuple((name, weight) for name, weight in content.get("source_weights", ()))
            nested = {"model": model, "lora": adapters, "source_weights": weights}
            return cls(**{**content, **nested})
        except InputError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"The run's configuration does not fit this version: {error}."
            ) from error


PRESETS: dict[tuple[Preset, Stage], dict[str, Any]] = {
    # VampNet's own recipe: section 5 of the paper, and its published configuration.
    ("coarse", "coarse"): {
        "n_codebooks": 4,
        "n_conditioning_codebooks": 0,
        "n_layers": 20,
        "n_heads": 20,
        "embedding_dim": 1280,
        "remat": "dots",
        "window_seconds": 10.0,
        "min_loudness": -30.0,
        "steps": 1_000_000,
    },
    ("fine", "fine"): {
        "n_conditioning_codebooks": 4,
        "n_layers": 16,
        "n_heads": 20,
        "embedding_dim": 1280,
        "remat": "dots",
        "window_seconds": 3.0,
        "min_loudness": -40.0,
        "steps": 500_000,
    },
    # Sizes between: the published recipe with less width and fewer layers and steps.
    ("small", "coarse"): {
        "n_codebooks": 4,
        "n_conditioning_codebooks": 0,
        "n_layers": 8,
        "n_heads": 8,
        "embedding_dim": 512,
        "window_seconds": 10.0,
        "min_loudness": -30.0,
        "steps": 200_000,
    },
    ("small", "fine"): {
        "n_conditioning_codebooks": 4,
        "n_layers": 6,
        "n_heads": 8,
        "embedding_dim": 512,
        "window_seconds": 3.0,
        "min_loudness": -40.0,
        "steps": 100_000,
    },
    ("base", "coarse"): {
        "n_codebooks": 4,
        "n_conditioning_codebooks": 0,
        "n_layers": 14,
        "n_heads": 12,
        "embedding_dim": 768,
        "window_seconds": 10.0,
        "min_loudness": -30.0,
        "steps": 500_000,
    },
    ("base", "fine"): {
        "n_conditioning_codebooks": 4,
        "n_layers": 11,
        "n_heads": 12,
        "embedding_dim": 768,
        "window_seconds": 3.0,
        "min_loudness": -40.0,
        "steps": 250_000,
    },
    # The model in the box: an hour on two CPU cores.
    ("tiny", "coarse"): {
        "n_codebooks": 4,
        "n_conditioning_codebooks": 0,
        "n_layers": 4,
        "n_heads": 8,
        "embedding_dim": 256,
        "dropout": 0.05,
        "window_seconds": 10.0,
        "min_loudness": -30.0,
        "batch_size": 8,
        "schedule": "cosine",
        "learning_rate": 1.5e-3,
        "warmup_steps": 100,
        "weight_decay": 0.05,
        "label_smoothing": 0.0,
        "ema_decay": 0.998,
        "validate_every": 500,
    },
    ("tiny", "fine"): {
        "n_conditioning_codebooks": 4,
        "n_layers": 4,
        "n_heads": 4,
        "embedding_dim": 128,
        "dropout": 0.0,
        "window_seconds": 3.0,
        "min_loudness": -40.0,
        "batch_size": 12,
        "schedule": "cosine",
        "learning_rate": 2e-3,
        "warmup_steps": 50,
        "label_smoothing": 0.0,
        "ema_decay": 0.998,
        "validate_every": 500,
    },
}
"""Model and training fields by (preset, stage); what is absent keeps its default.

`n_codebooks` of a fine model is the codec's unless given.
"""
LORA: dict[str, Any] = {"warmup_steps": 500, "batch_size": 8, "validate_every": 250}
"""What differs from the preset of the stage where a model is adapted."""

_MODEL_FIELDS = {field.name for field in dataclasses.fields(ModelConfig)}


def preset_config(
    preset: Preset,
    stage: Stage,
    overrides: Mapping[str, Any],
    *,
    codec_codebooks: int,
    codebook_size: int,
    latent_dim: int,
) -> TrainConfig:
    """A preset with some fields changed, for tokens of a given codec.

    Args:
      preset: which recipe.
      stage: `coarse` predicts the first codebooks, `fine` the rest.
      overrides: fields of `TrainConfig` and `ModelConfig`; None means not given.
      codec_codebooks, codebook_size, latent_dim: the codec's C, V and d.

    Raises:
      InputError: impossible values, or a preset of the other stage.
    """
    if (preset, stage) not in PRESETS:
        raise InputError(f"Preset {preset!r} is for the {preset} stage, not the {stage} one.")
    values = dict(PRESETS[preset, stage])
    given = {name: value for name, value in overrides.items() if value is not None}
    if "minutes" in given and "steps" not in given:
        values.pop("steps", None)
    values.update(given)
    values.setdefault("n_codebooks", codec_codebooks)
    if values["n_codebooks"] > codec_codebooks:
        raise InputError(
            f"The model would read {values['n_codebooks']} codebooks, but the tokens have "
            f"{codec_codebooks}; set n_codebooks."
        )
    values |= {"vocab_size": codebook_size, "latent_dim": latent_dim}
    model = {name: value for name, value in values.items() if name in _MODEL_FIELDS}
    rest = {name: value for name, value in values.items() if name not in _MODEL_FIELDS}
    return TrainConfig(model=ModelConfig(**model), **rest)


def adapting(overrides: Mapping[str, Any], window_seconds: float | None) -> dict[str, Any]:
    """Settings for LoRA adapters of a model, to be completed by the preset of its stage.

    Args:
      overrides: fields of `TrainConfig` and `ModelConfig`; None means not given.
      window_seconds: what the model reads at once; None leaves it to the preset.

    Raises:
      InputError: neither steps nor minutes are given.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    if not given.keys() & {"steps", "minutes"}:
        raise InputError(NO_END)
    window = {} if window_seconds is None else {"window_seconds": window_seconds}
    return {**LORA, **window, **given}
