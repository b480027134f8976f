"""From a model directory to the files that the original VampNet loads."""

import dataclasses
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import codec_bridge
from codec_bridge.errors import InputError
from vampnet_jax import lora, pth, pth_table, release
from vampnet_jax.config import ModelConfig

STAGES = {"coarse.pth": "coarse", "c2f.pth": "fine"}
FILES = (*STAGES, "codec.pth")


def export_torch(
    name_or_directory: str | os.PathLike, out: str | os.PathLike, *, overwrite: bool = False
) -> None:
    """Write a model as `coarse.pth`, `c2f.pth` and `codec.pth`, as the original names them.

    Kept LoRA adapters of the original's form go into the file as such; others are merged first,
    since the original could not read them.

    Args:
      name_or_directory: as for `vampnet_jax.load`.
      out: folder, made if missing; each file appears whole or not at all.
      overwrite: replace files that exist.

    Raises:
      InputError: there is no such model, or a file exists or cannot be written.
    """
    import torch

    directory, out = release.resolve(name_or_directory), Path(out)
    existing = [name for name in FILES if (out / name).exists()]
    if existing and not overwrite:
        raise InputError(f"{out / existing[0]} exists; choose another folder or overwrite it.")
    description = release.read_description(directory)
    try:
        out.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".export.", dir=out))
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror or error}.") from None
    try:
        for name, stage in STAGES.items():
            torch.save(_stage(directory, stage, description), staging / name)
        torch.save(_codec(directory), staging / "codec.pth")
        for name in FILES:
            os.replace(staging / name, out / name)
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError of torch.save
        raise InputError(f"{out} cannot be written: {error}.") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _stage(directory: Path, stage: str, description: dict[str, Any]) -> dict[str, Any]:
    config = ModelConfig(**description[stage]["config"])
    params = release.load_params(directory / f"{stage}.safetensors", config)
    kept = release.load_adapters(directory, stage, description)
    if kept is None:
        return pth.export(params, config)
    adapters, lora_config = kept
    if lora_config == pth_table.LORA:
        return pth.export(params, config, adapters)
    return pth.export(lora.merge_on_host(params, adapters, lora_config), config)


def _codec(directory: Path) -> dict[str, Any]:
    """A codec in the form that the original and descript-audio-codec save it in."""
    import torch

    from codec_bridge.pth import weight_norm

    codec = codec_bridge.load(directory / "codec.safetensors")
    state: dict[str, torch.Tensor] = {}
    for name, weight in codec.tensors.items():
        if name.endswith(".weight") and not name.endswith(".codebook.weight"):
            state[f"{name}_g"] = torch.from_numpy(weight_norm(weight))
            state[f"{name}_v"] = torch.from_numpy(np.array(weight))
        else:
            state[name] = torch.from_numpy(np.array(weight))
    kwargs = dataclasses.asdict(codec.config)
    kwargs |= {name: list(kwargs[name]) for name in ("encoder_rates", "decoder_rates")}
    if kwargs["latent_dim"] == kwargs["encoder_dim"] * 2 ** len(kwargs["encoder_rates"]):
        del kwargs["latent_dim"]  # what both take by default
    return {"state_dict": state, "metadata": {"kwargs": kwargs | {"quantizer_dropout": False}}}
