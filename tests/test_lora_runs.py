"""Fine-tuning a model by LoRA, from the command to a model that can be sampled."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from small_codecs import random_codec
from small_models import random_model
from small_tokens import write_folder

import vampnet_jax as vampnet
from codec_bridge import Codec, InputError
from vampnet_jax import lora
from vampnet_jax.cli import run as run_command
from vampnet_jax.cli.merge_lora import main as merge
from vampnet_jax.cli.train import main as train
from vampnet_jax.training.checkpoints import load_adapters, load_run, read_run
from vampnet_jax.training.tokenising import describe

OPTIONS = [
    "--stage=coarse",
    "--lora-rank=2",
    "--lora-targets",
    "query",
    "down",
    "--steps=4",
    "--batch-size=4",
    "--log-every=2",
    "--validate-every=2",
    "--schedule=constant",
    "--learning-rate=0.05",
    "--seed=1",
]


def wide_model(codec: Codec, seed: int) -> vampnet.Model:
    """A coarse model of 1.3 MB, so that it matters whether checkpoints hold it."""
    model = random_model(codec)
    config = dataclasses.replace(model.coarse.config, embedding_dim=128, n_layers=2)
    params = vampnet.init(jax.random.key(seed), config, codec.codebooks)
    return dataclasses.replace(model, coarse=vampnet.Stage(params, config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Holds a model, another one, tokens of their codec, and a run."""
    folder = tmp_path_factory.mktemp("lora")
    codec = random_codec("dac")
    codebooks = np.asarray(codec.codebooks)
    vampnet.save(wide_model(codec, seed=0), folder / "model")
    vampnet.save(wide_model(codec, seed=1), folder / "other")
    lengths = [60, 60, 200, 300]
    write_folder(folder / "tokens", lengths, codec=describe(codec), codebooks=codebooks)
    arguments = ["--out", str(folder / "run"), "--lora-from", str(folder / "model")]
    assert train([str(folder / "tokens"), *arguments, *OPTIONS]) == 0
    return folder


def assert_same(one, other) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_run_trains_the_adapters_that_were_asked_for_with_the_recipe_for_lora(folder):
    config, facts = read_run(folder / "run")
    assert config.lora == lora.LoraConfig(rank=2, targets=("query", "down"))
    assert config.warmup_steps == 500
    assert (facts["stage"], facts["adapted"]["source"]) == ("coarse", str(folder / "model"))
    assert round(config.window_seconds * 125) == 40  # the model's window
    base = vampnet.load(folder / "model").coarse
    assert config.model.n_layers == base.config.n_layers
    adapters, _ = load_adapters(folder / "run")
    assert set(adapters) == {"query", "down"}
    assert all(np.abs(pair["b"]).max() > 0 for pair in adapters.values())
    params, _ = load_run(folder / "run")
    assert_same(params, lora.merge_on_host(base.params, adapters, config.lora))


def test_checkpoints_hold_adapters_and_not_the_model(folder):
    newest = folder / "run" / "checkpoints" / "4"
    stored = ocp.PyTreeCheckpointer().metadata(newest / "state").item_metadata.tree
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(stored) if leaf.shape]
    adapters, _ = load_adapters(folder / "run")
    base = vampnet.load(folder / "model").coarse.params
    # Adapters, their average and two moments; not the counters, which have no shape.
    wanted = 4 * sum(x.size for x in jax.tree.leaves(adapters))
    assert sum(sizes) == wanted + base["embedding"]["codebooks"].size
    on_disk = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    assert on_disk < sum(x.nbytes for x in jax.tree.leaves(base)) / 10


def test_a_continued_run_ends_with_the_same_adapters(folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    shutil.rmtree(run / "checkpoints" / "4")
    assert train(["--out", str(run), "--resume"]) == 0
    assert_same(*(load_adapters(path, step=4)[0] for path in (folder / "run", run)))


def test_merged_or_kept_adapters_give_the_same_model(folder, tmp_path):
    model, run = str(folder / "model"), str(folder / "run")
    assert merge([model, run, str(tmp_path / "merged")]) == 0
    assert merge([model, run, str(tmp_path / "kept"), "--keep-lora"]) == 0
    merged, kept = (vampnet.load(tmp_path / name) for name in ("merged", "kept"))
    assert_same(merged.coarse.params, load_run(run)[0])
    assert_same(merged.coarse.params, kept.coarse.params)
    before = vampnet.load(model)
    assert_same(merged.fine.params, before.fine.params)
    assert (merged.name, merged.coarse_window) == ("merged", before.coarse_window)
    assert "Adapted by LoRA" in merged.card
    assert (tmp_path / "kept" / "coarse.lora.safetensors").exists()
    assert not (tmp_path / "merged" / "coarse.lora.safetensors").exists()
    tokens = jnp.zeros((1, 8, 30), jnp.int32)
    assert vampnet.vamp(merged, tokens, tokens == 0, jax.random.key(0)).shape == tokens.shape


def test_what_does_not_belong_together_is_one_sentence(folder, tmp_path, capsys):
    model, other, run = (str(folder / name) for name in ("model", "other", "run"))
    tokens, out = str(folder / "tokens"), str(tmp_path / "out")

    def refuses(command: str, arguments: list[str], words: str) -> None:
        with pytest.raises(SystemExit) as stop:
            run_command(command, arguments)
        assert stop.value.code == 2
        assert words in capsys.readouterr().err.strip().splitlines()[-1]

    refuses("merge-lora", [other, run, out], "is not that of")
    refuses("merge-lora", [model, run, run, out], "second run of the coarse stage")
    refuses("merge-lora", [model, out], "one or two LoRA runs")
    refuses("merge-lora", [model, run, model], "exists")
    new = [tokens, "--out", out, "--steps=1"]
    refuses("train", [*new, "--lora-rank=2"], "--lora-from")
    refuses("train", [*new, "--lora-from", model, "--init-from", model], "exclude each other")
    refuses("train", [*new, "--lora-from", model, "--preset=coarse"], "leave --preset out")
    refuses("train", [*new, "--lora-from", model, "--n-layers=7"], "--n-layers 2")
    refuses("train", [*new, "--lora-from", model, "--lora-rank=0"], "LoRA rank is 0")
    refuses("train", [*new[:-1], "--lora-from", model], "give steps, minutes or both")
    refuses(
        "train", [*new, "--window-seconds=0.3", "--source-weight", "jazz=2"], "no source 'jazz'"
    )
    refuses("train", [*new, "--source-weight", "jazz"], "NAME=2.0")
    refuses("train", ["--out", run, "--lora-rank=3"], "another --lora-rank than 3")
    refuses("train", ["--out", run, "--lora-from", other], "cannot be continued")
    assert not (tmp_path / "out").exists()


def test_a_model_that_changed_since_is_refused(folder, tmp_path):
    moved = tmp_path / "run"
    shutil.copytree(folder / "run", moved)
    config = json.loads((moved / "config.json").read_text())
    config["adapted"]["source"] = str(folder / "other")
    (moved / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="no longer the model"):
        load_run(moved)
    config["adapted"]["source"] = str(tmp_path / "gone")
    (moved / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="cannot be loaded: there is no model"):
        load_run(moved)
