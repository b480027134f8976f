"""`load` and `save`: a model as a directory that can be handed on.

config.json           dimensions of both models, their windows, how they are best sampled, presets
                      of their own, the codec's fingerprint
coarse.safetensors    parameters, float32 or bfloat16; names are paths such as `blocks/query`;
fine.safetensors      their fingerprint is in the metadata
codec.safetensors     the codec, with its kind and dimensions
coarse.lora.safetensors, fine.lora.safetensors    LoRA adapters, where kept; merged at load
MODEL_CARD.md         what the model was trained on, its licence, figures
"""

import dataclasses
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

import codec_bridge
from codec_bridge.errors import InputError
from codec_bridge.hashes import fingerprint
from vampnet_jax import lora
from vampnet_jax import model as network
from vampnet_jax.config import Dtype, ModelConfig
from vampnet_jax.prompts import PRESETS, Prompt
from vampnet_jax.sampling import COARSE_DEFAULTS, FINE_DEFAULTS, SamplingOptions

FORMAT_VERSION = 1
MODELS_IN_THE_BOX = Path(__file__).parent / "models"
CARD = "MODEL_CARD.md"
FILES = ("config.json", "coarse.safetensors", "fine.safetensors", "codec.safetensors")
"""What a model directory must have; a card is welcome."""
MAX_WINDOW = 2**16
"""Frames."""


class Stage(NamedTuple):
    """One of the two transformers."""

    params: network.Params
    config: ModelConfig


@dataclasses.dataclass(frozen=True)
class Model:
    """A coarse and a fine model and the codec whose tokens they speak."""

    coarse: Stage
    fine: Stage
    codec: codec_bridge.Codec
    coarse_window: int
    """Frames the coarse model reads at once."""
    fine_window: int
    """Frames the fine model reads at once."""
    coarse_sampling: SamplingOptions = COARSE_DEFAULTS
    """How to sample the coarse model unless something else is asked for."""
    fine_sampling: SamplingOptions = FINE_DEFAULTS
    """The same for the fine model."""
    presets: Mapping[str, Prompt] = dataclasses.field(default_factory=lambda: PRESETS)
    """Prompts by name."""
    name: str = "unnamed"
    card: str = ""
    """The model card, Markdown."""

    def __post_init__(self) -> None:
        coarse, fine = self.coarse.config, self.fine.config
        if coarse.n_conditioning_codebooks or fine.n_conditioning_codebooks != coarse.n_codebooks:
            raise InputError(
                f"the coarse model makes {coarse.n_codebooks} codebooks and the fine model is "
                f"given {fine.n_conditioning_codebooks}; they do not belong together."
            )
        if fine.n_codebooks > self.codec.n_codebooks:
            raise InputError(
                f"the fine model speaks {fine.n_codebooks} codebooks and the codec has only "
                f"{self.codec.n_codebooks}; they do not belong together."
            )
        for config in (coarse, fine):
            if config.vocab_size != self.codec.codebook_size:
                raise InputError(
                    f"a model knows {config.vocab_size} codes and the codec has "
                    f"{self.codec.codebook_size}; they do not belong together."
                )

    def computing_in(self, dtype: Dtype) -> "Model":
        """The same model with another `ModelConfig.dtype` in both stages.

        cuDNN attention, which needs bfloat16, gives way to XLA's with another.
        """

        def changed(stage: Stage) -> Stage:
            attention = stage.config.attention if dtype == "bfloat16" else "xla"
            config = dataclasses.replace(stage.config, dtype=dtype, attention=attention)
            return stage._replace(config=config)

        coarse, fine = changed(self.coarse), changed(self.fine)
        return dataclasses.replace(self, coarse=coarse, fine=fine)

    @functools.cached_property
    def fingerprints(self) -> dict[str, str]:
        """`codec_bridge.hashes.fingerprint` of the weights of "coarse", "fine" and "codec".

        Hashed once, unless the files they were loaded from say it.
        """
        return {
            "coarse": params_fingerprint(self.coarse.params),
            "fine": params_fingerprint(self.fine.params),
            "codec": self.codec.fingerprint,
        }


def available_models() -> list[str]:
    """Names of the models that ship inside the package."""
    return sorted(path.parent.name for path in MODELS_IN_THE_BOX.glob("*/config.json"))


def load(name_or_directory: str | os.PathLike = "tiny", *, codec_device: str = "auto") -> Model:
    """Load a model by name or from its directory.

    Args:
      name_or_directory: a name of `available_models()`, "official" (after `vampnet download
        official`), or a directory that `save` wrote.
      codec_device: as of `codec_bridge.load`.

    Raises:
      InputError: there is no such model, or a file of it is missing, damaged or of another model.
    """
    directory = resolve(name_or_directory)
    description = read_description(directory)
    codec = load_codec(directory, device=codec_device)
    if codec.fingerprint != description["codec"]["fingerprint"]:
        raise InputError(f"the codec in {directory} is not the one that its models speak.")
    try:
        card = (directory / CARD).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):  # a model works without
        card = ""
    model = Model(
        coarse=load_stage(directory, "coarse", description),
        fine=load_stage(directory, "fine", description),
        codec=codec,
        coarse_window=description["coarse"]["window"],
        fine_window=description["fine"]["window"],
        coarse_sampling=sampling_defaults(description, "coarse"),
        fine_sampling=sampling_defaults(description, "fine"),
        presets=presets(description),
        name=description["name"],
        card=card,
    )
    said = {name: _said_fingerprint(directory, name, description) for name in ("coarse", "fine")}
    if all(said.values()):
        # Into the cache of this object: a model with other parameters made from it hashes its own.
        vars(model)["fingerprints"] = {**said, "codec": codec.fingerprint}
    return model


def load_codec(
    name_or_directory: str | os.PathLike = "tiny", *, device: str = "auto"
) -> codec_bridge.Codec:
    """The codec of a model alone; device as of `codec_bridge.load`."""
    path = _existing(resolve(name_or_directory), "codec.safetensors")
    return codec_bridge.load(path, device=device)


def find_codec(name_or_path: str | os.PathLike) -> codec_bridge.Codec:
    """The codec of a model in the box or of `official` by its name; else any codec file or name.

    Raises:
      InputError: there is no such codec, or its file is damaged.
    """
    name = str(name_or_path)
    if name in available_models() or name.partition(":")[0] == "official":
        return load_codec(name)
    return codec_bridge.load(name_or_path)


def resolve(name_or_directory: str | os.PathLike) -> Path:
    """The directory of a model, by its name or path."""
    if str(name_or_directory) in available_models():
        return MODELS_IN_THE_BOX / str(name_or_directory)
    if str(name_or_directory).partition(":")[0] == "official":
        from vampnet_jax import download

        return download.downloaded(str(name_or_directory))
    directory = Path(name_or_directory)
    if not directory.is_dir():
        raise InputError(
            f"there is no model {str(name_or_directory)!r}; give one in the box "
            f"({', '.join(available_models())}), official, or a model directory."
        )
    return directory


def save(
    model: Model,
    directory: str | os.PathLike,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    overwrite: bool = False,
    adapters: Mapping[str, tuple[lora.Adapters, lora.LoraConfig]] | None = None,
    companions: str | os.PathLike | None = None,
) -> None:
    """Write a model directory; it appears whole or not at all.

    What lies beside a model in a directory, such as licences and the table of token frequencies,
    stays when the model is replaced (the table unless the codec is another).

    Args:
      dtype: bfloat16 halves the files and rounds the parameters.
      overwrite: replace an existing model directory (an empty directory is always filled).
      adapters: LoRA adapters of the stages "coarse" and "fine" that are not merged into the
        model's parameters; they are kept in files of their own and merged when it is loaded.
      companions: a model directory from which such files are copied.

    Raises:
      InputError: the directory exists and overwrite is False, or cannot be written.
    """
    directory = Path(directory)
    check_free(directory, overwrite=overwrite)
    staging = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        staging.chmod(0o755)
        if model.name == "unnamed":
            model = dataclasses.replace(model, name=directory.name)
        codec_fingerprint = _write(model, staging, dtype, adapters or {})
        for old in (directory, companions):
            if old is not None and Path(old).is_dir():
                _copy_companions(Path(old), staging, codec_fingerprint)
        if directory.exists():
            replaced = staging.with_name(f"{staging.name}.replaced")
            directory.rename(replaced)  # out of the way: a rename cannot replace a full directory
            staging.rename(directory)
            shutil.rmtree(replaced)
        else:
            staging.rename(directory)
    except OSError as error:
        raise InputError(f"{directory} cannot be written: {error.strerror}.") from None
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def check_free(directory: Path, *, overwrite: bool) -> None:
    """Raise InputError, before any work is done, if `save` would refuse the directory."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not overwrite:
        raise InputError(f"{directory} exists; choose another name or overwrite it.")
    if not _holds_a_model_alone(directory):
        # Whatever it is, it is not ours to delete.
        raise InputError(f"{directory} exists and is no model directory; choose another name.")


def _holds_a_model_alone(directory: Path) -> bool:
    """Whether there is nothing in it that replacing a model must not delete."""
    inside = list(directory.iterdir()) if directory.is_dir() else []
    return {path.name for path in inside} >= set(FILES) and not any(p.is_dir() for p in inside)


def _copy_companions(old: Path, new: Path, codec_fingerprint: str) -> None:
    """Licences, examples and what else lies beside a model; token frequencies if of this codec."""
    for path in old.iterdir():
        if not path.is_file() or (new / path.name).exists():
            continue
        if path.suffix == ".safetensors" and _metadata(path).get("codec") != codec_fingerprint:
            continue
        shutil.copy2(path, new / path.name)


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def _write(
    model: Model,
    directory: Path,
    dtype: Literal["float32", "bfloat16"],
    adapters: Mapping[str, tuple[lora.Adapters, lora.LoraConfig]],
) -> str:
    """Write its files; returns the codec's fingerprint, rounded as it is written."""
    codec_bridge.save(model.codec, directory / "codec.safetensors", dtype=dtype)
    # Rounding changes the codec, and so its fingerprint.
    codec = codec_bridge.load(directory / "codec.safetensors")
    description: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "name": model.name,
        "codec": {
            "kind": codec.kind,
            "fingerprint": codec.fingerprint,
            "sample_rate": codec.sample_rate,
            "hop_length": codec.hop_length,
            "n_codebooks": codec.n_codebooks,
            "codebook_size": codec.codebook_size,
        },
    }
    for name, stage, window, sampling in (
        ("coarse", model.coarse, model.coarse_window, model.coarse_sampling),
        ("fine", model.fine, model.fine_window, model.fine_sampling),
    ):
        description[name] = {"window": window, "config": dataclasses.asdict(stage.config)}
        description[name] |= {"lora": name in adapters, "sampling": dataclasses.asdict(sampling)}
        _save_stage(stage, directory / f"{name}.safetensors", dtype)
        if name in adapters:
            lora.save(directory / f"{name}.lora.safetensors", *adapters[name])
    description["presets"] = {
        name: _differences(prompt)
        for name, prompt in model.presets.items()
        if prompt != PRESETS.get(name)
    }
    (directory / "config.json").write_text(json.dumps(description, indent=2) + "\n")
    (directory / CARD).write_text(model.card, encoding="utf-8")
    return codec.fingerprint


def _save_stage(stage: Stage, path: Path, dtype: str) -> None:
    from safetensors.numpy import save_file

    flat = flatten_dict(stage.params, sep="/")
    flat = {name: np.asarray(x, jnp.dtype(dtype)) for name, x in flat.items()}
    save_file(flat, path, metadata={"fingerprint": fingerprint(flat)})
    path.chmod(0o644)  # safetensors makes files that others cannot read


def load_stage(directory: Path, name: str, description: dict[str, Any]) -> Stage:
    """One of the two transformers alone, from a directory and its checked description."""
    stage = read_stage(directory, name, description)
    return stage._replace(params=network.to_device(stage.params))


def read_stage(directory: Path, name: str, description: dict[str, Any]) -> Stage:
    """The same with its parameters in the host's memory, as NumPy arrays."""
    config = ModelConfig(**description[name]["config"])
    params = load_params(_existing(directory, f"{name}.safetensors"), config)
    kept = load_adapters(directory, name, description)
    if kept is not None:
        params = lora.merge_on_host(params, *kept)
    return Stage(params, config)


def params_fingerprint(params: network.Params) -> str:
    """`codec_bridge.hashes.fingerprint` of a model's parameters, by their paths."""
    return fingerprint(flatten_dict(params, sep="/"))


def _said_fingerprint(directory: Path, name: str, description: dict[str, Any]) -> str | None:
    """That of a stage, if its file says it and nothing is merged into what the file holds."""
    if description[name].get("lora", False):
        return None
    return _metadata(directory / f"{name}.safetensors").get("fingerprint")


def load_adapters(
    directory: Path, name: str, description: dict[str, Any]
) -> tuple[lora.Adapters, lora.LoraConfig] | None:
    """The adapters that are kept beside a stage, if any."""
    if not description[name].get("lora", False):
        return None
    path = _existing(directory, f"{name}.lora.safetensors")
    return lora.load(path, ModelConfig(**description[name]["config"]))


def load_params(path: Path, config: ModelConfig) -> network.Params:
    """Read a parameter file, checked against the configuration before anything is loaded.

    Returns:
      Parameters as `vampnet_jax.apply` takes them, but NumPy arrays in the host's memory.
    """
    from safetensors import SafetensorError, safe_open

    shape = (config.n_codebooks, config.vocab_size, config.latent_dim)
    codebooks = jax.ShapeDtypeStruct(shape, jnp.float32)
    wanted = jax.eval_shape(lambda c: network.init(jax.random.key(0), config, c), codebooks)
    wanted = {name: x.shape for name, x in flatten_dict(wanted, sep="/").items()}
    try:
        with safe_open(path, framework="numpy") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            wrong = sorted(name for name, _ in set(found.items()) ^ set(wanted.items()))
            if wrong:
                raise InputError(
                    f"{path} does not fit its config.json: {', '.join(dict.fromkeys(wrong))} "
                    "missing, unknown or of another shape."
                )
            flat = {name: file.get_tensor(name).astype(np.float32, copy=False) for name in wanted}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged ({error}); fetch or make it again.") from None
    return unflatten_dict(flat, sep="/")


def sampling_defaults(description: dict[str, Any], name: str) -> SamplingOptions:
    """How a stage is sampled unless something else is asked for; the original's way if not said."""
    original = {"coarse": COARSE_DEFAULTS, "fine": FINE_DEFAULTS}[name]
    return dataclasses.replace(original, **description[name].get("sampling", {}))


def presets(description: dict[str, Any]) -> dict[str, Prompt]:
    """Prompts by name: the original's, and those that the model has instead of or besides them."""
    given = description.get("presets", {})
    if not isinstance(given, dict) or not all(isinstance(x, dict) for x in given.values()):
        raise InputError("presets must be options by name, by the name of the preset")
    own = {}
    for name, values in given.items():
        unknown = values.keys() - {field.name for field in dataclasses.fields(Prompt)}
        if unknown:
            raise InputError(f"preset {name!r}: there is no option {min(unknown)!r}")
        if "regions" in values:
            values = values | {"regions": tuple(map(tuple, values["regions"]))}
        try:
            own[name] = Prompt(**values)
        except InputError as error:
            raise InputError(f"preset {name!r}: {error}") from None
    return PRESETS | own


def _differences(prompt: Prompt) -> dict[str, Any]:
    """The options of a prompt that differ from those of one that keeps nothing."""
    nothing = dataclasses.asdict(Prompt())
    return {k: v for k, v in dataclasses.asdict(prompt).items() if v != nothing[k]}


def read_description(directory: Path) -> dict[str, Any]:
    """The checked content of config.json."""
    path = _existing(directory, "config.json")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        version = description["format_version"]
        if version != FORMAT_VERSION:
            raise ValueError(
                f"it has format {version!r}; this version of vampnet-jax reads {FORMAT_VERSION}"
            )
        if not isinstance(description["name"], str):
            raise TypeError("name is not a string")
        if not isinstance(description["codec"]["fingerprint"], str):
            raise TypeError("codec.fingerprint is not a string")
        for name in ("coarse", "fine"):
            ModelConfig(**description[name]["config"])
            window = description[name]["window"]
            if type(window) is not int or not 1 <= window <= MAX_WINDOW:
                raise TypeError(f"{name}.window is {window!r}")
            sampling_defaults(description, name)
        presets(description)
    except KeyError as error:
        raise InputError(f"{path} does not describe a model (it has no {error}).") from None
    except RecursionError:
        raise InputError(f"{path} does not describe a model (it is nested too deeply).") from None
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).rstrip(".")
        raise InputError(f"{path} does not describe a model ({reason}).") from None
    return description


def _existing(directory: Path, name: str) -> Path:
    path = directory / name
    if not path.is_file():
        raise InputError(f"{directory} has no {name}; it is not a complete model directory.")
    return path
