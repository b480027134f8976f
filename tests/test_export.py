"""Export to the original's files: its keys, shapes, types and metadata, and nothing lost."""

import dataclasses
import json
import os
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import codec_bridge
import vampnet_jax as vampnet
from codec_bridge.errors import InputError
from vampnet_jax import cli, lora, pth, release
from vampnet_jax.exporting import export_torch
from vampnet_jax.importing import Source, import_model
from vampnet_jax.training.checkpoints import Checkpoints, load_run, write_run
from vampnet_jax.training.config import TrainConfig
from vampnet_jax.training.step import init_state

GOLDEN = Path(__file__).parent / "golden"
FILES = ("coarse.pth", "c2f.pth", "codec.pth")


def make_model(directory: Path, suffix: str = "", **options) -> Path:
    import_model(
        Source(GOLDEN / f"coarse{suffix}.pth"),
        Source(GOLDEN / f"c2f{suffix}.pth"),
        GOLDEN / "codec.pth",
        directory,
        **options,
    )
    return directory


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "merged", "_lora_finetuned")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "kept"
    return make_model(path, "_lora_finetuned", keep_lora=True)


def read_pth(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def assert_same_bits(a, b) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(bits(x), bits(y)), a, b)


def bits(array) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint32)


@pytest.mark.parametrize("model", ["merged", "kept"])
def test_files_have_the_originals_keys_shapes_types_and_metadata(model, request, tmp_path):
    export_torch(request.getfixturevalue(model), tmp_path)
    for name in FILES:
        ours, theirs = read_pth(tmp_path / name), read_pth(GOLDEN / name)
        described = [
            {key: (value.shape, value.dtype) for key, value in content["state_dict"].items()}
            for content in (ours, theirs)
        ]
        assert described[0] == described[1]
        assert ours["metadata"] == theirs["metadata"]


def test_exported_and_imported_again_parameters_are_the_same_to_the_bit(merged, tmp_path):
    export_torch(merged, tmp_path)
    model = vampnet.load(merged)
    for name, stage in (("coarse.pth", model.coarse), ("c2f.pth", model.fine)):
        params, config = vampnet.from_torch(tmp_path / name, tmp_path / "codec.pth")
        assert config == stage.config
        assert_same_bits(params, stage.params)
    assert codec_bridge.load(tmp_path / "codec.pth").fingerprint == model.codec.fingerprint


def test_kept_adapters_come_back_as_they_were(kept, tmp_path):
    export_torch(kept, tmp_path)
    codebooks = np.asarray(codec_bridge.load(GOLDEN / "codec.pth").codebooks)
    for name in ("coarse", "c2f"):
        before = pth.read(GOLDEN / f"{name}_lora_finetuned.pth", codebooks, keep_lora=True)
        after = pth.read(tmp_path / f"{name}.pth", codebooks, keep_lora=True)
        assert_same_bits(after.params, before.params)
        assert_same_bits(after.adapters, before.adapters)
        theirs = read_pth(GOLDEN / f"{name}_lora_finetuned.pth")["state_dict"]
        for key, tensor in read_pth(tmp_path / f"{name}.pth")["state_dict"].items():
            if "classifier.layers.0.weight" not in key:  # there v is W and g its length
                assert torch.equal(tensor, theirs[key]), key


def test_a_model_with_kept_adapters_loads_as_the_merged_one(merged, kept):
    assert (kept / "coarse.lora.safetensors").is_file()
    assert not (merged / "coarse.lora.safetensors").exists()
    for name in ("coarse", "fine"):
        ours, theirs = (getattr(vampnet.load(path), name).params for path in (kept, merged))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), ours, theirs)


def test_a_model_whose_adapters_are_lost_is_refused(tmp_path):
    model = make_model(tmp_path / "model", keep_lora=True)
    (model / "fine.lora.safetensors").unlink()
    with pytest.raises(InputError, match=r"no fine\.lora\.safetensors"):
        vampnet.load(model)


def test_adapters_of_another_model_are_refused(kept, tmp_path):
    model = make_model(tmp_path / "model", keep_lora=True)
    (model / "coarse.lora.safetensors").write_bytes((kept / "fine.lora.safetensors").read_bytes())
    with pytest.raises(InputError, match="adapters of another model"):
        vampnet.load(model)


@pytest.mark.parametrize("damage", [b"", b"\0" * 100, b"\xff" * 100])
def test_damaged_adapters_are_refused(tmp_path, damage):
    model = make_model(tmp_path / "model", keep_lora=True)
    (model / "coarse.lora.safetensors").write_bytes(damage)
    with pytest.raises(InputError, match=r"coarse\.lora\.safetensors"):
        vampnet.load(model)


def test_adapters_that_the_original_cannot_hold_are_merged_into_the_export(merged, tmp_path):
    model = vampnet.load(merged)
    config = lora.LoraConfig(rank=3, alpha=6.0, targets=("key", "down"))
    adapters = lora.init(jax.random.key(0), model.coarse.config, config)
    adapters["key"]["b"] += 0.1
    vampnet.save(model, tmp_path / "model", adapters={"coarse": (adapters, config)})
    changed = vampnet.load(tmp_path / "model").coarse.params
    assert not np.allclose(changed["blocks"]["key"], model.coarse.params["blocks"]["key"])
    export_torch(tmp_path / "model", tmp_path / "out")
    back, _ = vampnet.from_torch(tmp_path / "out" / "coarse.pth", tmp_path / "out" / "codec.pth")
    assert_same_bits(back, changed)


def test_new_adapters_change_nothing_and_training_them_does(merged):
    stage = vampnet.load(merged).coarse
    config = lora.LoraConfig(rank=4)
    adapters = lora.init(jax.random.key(0), stage.config, config)
    assert_same_bits(lora.merge(stage.params, adapters, config), stage.params)

    def energy(adapters):
        blocks = lora.merge(stage.params, adapters, config)["blocks"]
        return sum((blocks[name] ** 2).sum() for name in config.targets)

    gradient = jax.jit(jax.grad(energy))(adapters)
    assert set(gradient) == set(config.targets)
    assert all(np.any(pair["b"]) for pair in gradient.values())


@pytest.mark.parametrize(
    "wrong", [{"rank": 0}, {"alpha": -1.0}, {"targets": ()}, {"targets": ("norm",)}]
)
def test_impossible_adapter_settings_are_refused(wrong):
    with pytest.raises(InputError, match="LoRA"):
        lora.LoraConfig(**wrong)


def test_an_export_replaces_nothing_unless_told(merged, tmp_path):
    (tmp_path / "codec.pth").write_text("mine")
    with pytest.raises(InputError, match=r"codec\.pth exists"):
        export_torch(merged, tmp_path)
    assert (tmp_path / "codec.pth").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codec.pth"]
    export_torch(merged, tmp_path, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)


def test_import_and_export_from_the_command_line(tmp_path, capsys):
    model, out, card = tmp_path / "model", tmp_path / "out", tmp_path / "card.md"
    card.write_text("# Golden\n")
    golden = {name: str(GOLDEN / name) for name in FILES}
    arguments = ["--coarse", golden["coarse.pth"], "--fine", golden["c2f.pth"]]
    arguments += ["--codec", golden["codec.pth"], "--name", "golden", "--card", str(card)]
    windows = ["--coarse-window", "2", "--fine-window", "1"]
    assert run("import", str(model), *arguments, *windows, "--dtype", "bfloat16") == 0
    loaded = vampnet.load(model)
    assert (loaded.name, loaded.card) == ("golden", "# Golden\n")
    # 2 s and 1 s of 44100 / 768 frames per second, rounded up
    assert (loaded.coarse_window, loaded.fine_window) == (115, 58)
    assert run("import", str(model), *arguments) == 2
    assert "exists" in capsys.readouterr().err
    assert run("import", str(model), *arguments, "--overwrite", "--keep-lora") == 0
    assert vampnet.load(model).coarse_window == 575
    assert vampnet.load(model).fine_window == 173
    assert release.read_description(model)["coarse"]["lora"] is True
    assert run("export-torch", str(model), str(out)) == 0
    assert run("export-torch", str(model), str(out)) == 2
    assert run("export-torch", str(model), str(out), "--overwrite") == 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of a coarse and a fine training run, as training leaves them, and the codec."""
    from small_codecs import random_codec

    folder, codec = tmp_path_factory.mktemp("runs"), random_codec()
    codec_bridge.save(codec, folder / "codec.safetensors")
    config = vampnet.ModelConfig(2, 0, 1, 2, 16, codec.codebook_size)
    for name, changes, seconds in (
        ("coarse", {}, 4.0),
        ("fine", {"n_codebooks": 5, "n_conditioning_codebooks": 2}, 1.5),
    ):
        training = TrainConfig(
            model=dataclasses.replace(config, **changes), window_seconds=seconds, steps=1
        )
        codebooks = jnp.asarray(codec.codebooks[: training.model.n_codebooks])
        (folder / name).mkdir()
        write_run(folder / name, training, {"codec": {"fingerprint": codec.fingerprint}})
        checkpoints = Checkpoints(folder / name, keep=1)
        checkpoints.save(0, jax.jit(partial(init_state, training))(codebooks), 1.0, None)
        checkpoints.close()
    return {name: folder / name for name in ("coarse", "fine", "codec.safetensors")}


def test_training_runs_become_a_model_with_their_own_windows(runs, tmp_path):
    import_model(Source(runs["coarse"]), Source(runs["fine"]), runs["codec.safetensors"],
                 tmp_path / "model")  # fmt: skip
    model = vampnet.load(tmp_path / "model")
    assert (model.coarse_window, model.fine_window) == (500, 188)  # of 125 frames per second
    assert_same_bits(model.fine.params, load_run(runs["fine"])[0])
    tokens = np.zeros((1, 5, 20), np.int32)
    options = vampnet.SamplingOptions(steps=2)
    mask = np.ones(tokens.shape, bool)
    out = vampnet.vamp(model, tokens, mask, jax.random.key(0), coarse=options, fine=options)
    assert out.shape == tokens.shape
    export_torch(tmp_path / "model", tmp_path / "out")
    params, config = vampnet.from_torch(
        tmp_path / "out" / "c2f.pth", tmp_path / "out" / "codec.pth"
    )
    assert_same_bits(params, model.fine.params)
    assert config.n_conditioning_codebooks == 2


def test_training_runs_do_not_go_with_another_codec_or_a_lora_file(runs, tmp_path):
    coarse, fine = Source(runs["coarse"]), Source(runs["fine"])
    with pytest.raises(InputError, match="tokens of another codec"):
        import_model(coarse, fine, GOLDEN / "codec.pth", tmp_path / "model")
    tuned = Source(runs["coarse"], lora_path=GOLDEN / "coarse.pth")
    with pytest.raises(InputError, match="is a training run"):
        import_model(tuned, fine, runs["codec.safetensors"], tmp_path / "model")
    with pytest.raises(InputError, match="window of 0"):
        import_model(Source(runs["coarse"], window_seconds=0.0), fine,
                     runs["codec.safetensors"], tmp_path / "model")  # fmt: skip
    with pytest.raises(InputError, match="no training run"):
        import_model(Source(tmp_path), fine, runs["codec.safetensors"], tmp_path / "model")


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such permissions")
def test_a_model_directory_can_be_read_by_others(kept):
    for path in (kept, *kept.iterdir()):
        assert path.stat().st_mode & 0o044 == 0o044, path.name


def test_a_directory_that_is_no_model_is_never_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="no model directory"):
        make_model(tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("coarse", "fine", "message"),
    [
        ("c2f.pth", "coarse.pth", "do not belong together"),
        ("nowhere.pth", "c2f.pth", r"nowhere\.pth"),
        ("meta.json", "c2f.pth", r"meta\.json"),
        ("codec.pth", "c2f.pth", r"codec\.pth"),
    ],
)
def test_sources_that_are_wrong_leave_nothing_behind(tmp_path, coarse, fine, message):
    with pytest.raises(InputError, match=message):
        import_model(
            Source(GOLDEN / coarse), Source(GOLDEN / fine), GOLDEN / "codec.pth", tmp_path / "m"
        )
    assert list(tmp_path.iterdir()) == []


def test_the_card_names_the_sources_and_their_hashes(merged):
    import hashlib

    card = (merged / "MODEL_CARD.md").read_text()
    for name in ("coarse_lora_finetuned.pth", "c2f_lora_finetuned.pth", "codec.pth"):
        assert hashlib.sha256((GOLDEN / name).read_bytes()).hexdigest() in card
    assert json.loads((merged / "config.json").read_text())["name"] == "merged"


def run(*argv: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        cli.main(list(argv))
    return exit_.value.code
