"""From checkpoints of the original, training runs or LoRA adapters to a model directory."""

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

import codec_bridge
from codec_bridge.errors import InputError
from codec_bridge.hashes import file_hash
from vampnet_jax import lora, pth, release
from vampnet_jax.prompts import frames

WINDOW_SECONDS = {"coarse": 10.0, "fine": 3.0}
"""What the original's models read at once."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Where one stage comes from."""

    path: Path
    """A `.pth` of the original VampNet, or the folder of a training run."""
    lora_path: Path | None = None
    """A fine-tune's `lora.pth`, whose adapters replace the checkpoint's own."""
    window_seconds: float | None = None
    """What the model reads at once; if not given, that of the training run, or the original's 10 s
    (coarse) and 3 s (fine)."""


def import_model(
    coarse: Source,
    fine: Source,
    codec_path: str | os.PathLike,
    directory: str | os.PathLike,
    *,
    keep_lora: bool = False,
    dtype: Literal["float32", "bfloat16"] = "float32",
    name: str = "unnamed",
    card: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model directory that `vampnet_jax.load` takes.

    Args:
      coarse, fine: the two stages.
      codec_path: the codec of both, any file or name `release.find_codec` takes.
      directory: appears whole or not at all.
      keep_lora: keep the original's LoRA adapters in files of their own (merged when the model is
        loaded) instead of merging them into the weights now.
      dtype: as `vampnet_jax.save`.
      name: of the model; the directory's, if none is given.
      card: the model card; one that names the sources, if none is given.
      overwrite: replace an existing model directory.

    Raises:
      InputError: a source is unreadable, unsafe or damaged, the parts do not belong together, or
        the directory exists.
    """
    directory = Path(directory)
    release.check_free(directory, overwrite=overwrite)
    codec = release.find_codec(codec_path)
    stages, windows, adapters = [], [], {}
    for stage, source in (("coarse", coarse), ("fine", fine)):
        checkpoint, seconds = _read(source, codec, keep_lora)
        stages.append(release.Stage(checkpoint.params, checkpoint.config))
        windows.append(_frames(WINDOW_SECONDS[stage] if seconds is None else seconds, codec))
        if checkpoint.adapters is not None:
            adapters[stage] = (checkpoint.adapters, checkpoint.lora_config)
    if card is None:
        card = _card(name if name != "unnamed" else directory.name, coarse, fine, Path(codec_path))
    model = release.Model(stages[0], stages[1], codec, windows[0], windows[1], name=name, card=card)
    release.save(model, directory, dtype=dtype, overwrite=overwrite, adapters=adapters)


def merge_lora(
    model: str | os.PathLike,
    runs: Sequence[str | os.PathLike],
    directory: str | os.PathLike,
    *,
    keep_lora: bool = False,
    dtype: Literal["float32", "bfloat16"] = "float32",
    name: str = "unnamed",
    overwrite: bool = False,
) -> None:
    """Write a model with the adapters of LoRA runs.

    Args:
      model: what the runs adapt, a directory or a name; what they do not adapt is taken as it is.
      runs: folders of LoRA runs, one for a stage at most. Of each the checkpoint of lowest
        validation loss is taken.
      directory: appears whole or not at all.
      keep_lora: keep the adapters in files of their own (merged when the model is loaded) instead
        of merging them into the weights now.
      dtype, name, overwrite: as for `import_model`.

    Raises:
      InputError: a run is none, trains no adapters or those of another model, two train one
        stage, or the directory exists.
    """
    from vampnet_jax.training.checkpoints import load_adapters, read_run

    directory = Path(directory)
    release.check_free(directory, overwrite=overwrite)
    if (Path(model) / "checkpoints").is_dir():
        raise InputError(
            f"{model} is a training run, not a model; make a model of it and the adapters with "
            "vampnet import, which takes LoRA runs."
        )
    whole = release.load(model)
    adapters: dict[str, tuple[lora.Adapters, lora.LoraConfig]] = {}
    for run in map(Path, runs):
        facts = read_run(run)[1]
        stage = facts["stage"]
        if stage in adapters:
            raise InputError(f"{run} is a second run of the {stage} stage; give one.")
        adapters[stage] = load_adapters(run)
        if whole.fingerprints[stage] != facts["adapted"]["fingerprint"]:
            raise InputError(
                f"{run} adapts {facts['adapted']['source']}, whose {stage} stage is not that of "
                f"{model}; give that model."
            )
    note = "\n".join(f"- the {stage} stage by {kind[1]}" for stage, kind in adapters.items())
    whole = dataclasses.replace(
        whole, name=name, card=f"{whole.card.rstrip()}\n\n## Adapted by LoRA\n\n{note}\n"
    )
    if not keep_lora:
        merged = {
            stage: getattr(whole, stage)._replace(
                params=lora.merge_on_host(getattr(whole, stage).params, *pair)
            )
            for stage, pair in adapters.items()
        }
        whole, adapters = dataclasses.replace(whole, **merged), {}
    release.save(
        whole, directory, dtype=dtype, overwrite=overwrite, adapters=adapters,
        companions=release.resolve(model),
    )  # fmt: skip


def _read(
    source: Source, codec: codec_bridge.Codec, keep_lora: bool
) -> tuple[pth.Checkpoint, float | None]:
    """A stage, and its window in seconds where that is given or known."""
    if not source.path.is_dir():
        codebooks = np.asarray(codec.codebooks)
        checkpoint = pth.read(
            source.path, codebooks, lora_path=source.lora_path, keep_lora=keep_lora
        )
        return checkpoint, source.window_seconds
    if source.lora_path is not None:
        raise InputError(f"{source.path} is a training run; a lora.pth goes with a .pth file.")
    from vampnet_jax.training.checkpoints import load_run, read_run

    training, facts = read_run(source.path)
    if facts.get("codec", {}).get("fingerprint") != codec.fingerprint:
        raise InputError(
            f"{source.path} was trained on the tokens of another codec; give that one."
        )
    params, config = load_run(source.path)
    seconds = training.window_seconds if source.window_seconds is None else source.window_seconds
    return pth.Checkpoint(dict(params), config), seconds


def _frames(seconds: float, codec: codec_bridge.Codec) -> int:
    if not 0 < seconds < math.inf:
        raise InputError(f"A window of {seconds} s is impossible; give a positive length.")
    return frames(seconds, codec.frame_rate)


def _card(name: str, coarse: Source, fine: Source, codec_path: Path) -> str:
    lines = [f"# {name}", "", "Imported by vampnet-jax from:", ""]
    paths = {"coarse": coarse.path, "coarse adapters": coarse.lora_path, "fine": fine.path}
    paths |= {"fine adapters": fine.lora_path, "codec": codec_path}
    for part, path in paths.items():
        if path is not None and path.is_file():
            lines.append(f"- {part}: `{path.name}`, SHA-256 `{file_hash(path)}`")
        elif path is not None:
            lines.append(f"- {part}: `{path.name}`")
    return "\n".join([*lines, "", "Licence and training data: those of the files above.", ""])
