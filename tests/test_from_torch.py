"""Reading the original's checkpoint files: every key accounted for, nothing else let in."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from codec_bridge.errors import InputError
from vampnet_jax import lora, model, pth, pth_table
from vampnet_jax.config import ModelConfig

GOLDEN = Path(__file__).parent / "golden"
OFFICIAL = {
    "coarse": ModelConfig(n_codebooks=4, n_layers=20),
    "c2f": ModelConfig(n_codebooks=14, n_conditioning_codebooks=4, n_layers=16),
}
QUERY = "transformer.layers.1.self_attn.w_qs"
CODEBOOKS = np.random.default_rng(0).normal(size=(14, 256, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def original() -> dict:
    return torch.load(GOLDEN / "coarse_lora_finetuned.pth", weights_only=True)


@pytest.fixture
def checkpoint(original) -> dict:
    return copy.deepcopy(original)


@pytest.fixture
def write(tmp_path):
    def write(content: object) -> Path:
        torch.save(content, tmp_path / "edited.pth")
        return tmp_path / "edited.pth"

    return write


def equal(a, b) -> bool:
    """Trees equal to the last bit."""
    same = jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b)
    return jax.tree.all(same)


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_table_names_every_tensor_of_the_official_files(name):
    shapes = json.loads((GOLDEN / "official_state_dict_shapes.json").read_text())[name]
    wanted = pth_table.expected(OFFICIAL[name], pth_table.LORA.rank)
    assert {key: list(shape) for key, shape in wanted.items()} == shapes


def test_prefixes_of_compiled_modules_are_stripped(checkpoint, write):
    plain = pth.read(write(checkpoint), CODEBOOKS)
    state = checkpoint["state_dict"]
    checkpoint["state_dict"] = {f"_orig_mod.{key}": value for key, value in state.items()}
    assert equal(pth.read(write(checkpoint), CODEBOOKS).params, plain.params)


def test_a_key_with_and_without_prefix_is_refused(checkpoint, write):
    state = checkpoint["state_dict"]
    state[f"_orig_mod.{QUERY}.weight"] = state[f"{QUERY}.weight"]
    with pytest.raises(InputError, match=r"w_qs\.weight twice"):
        pth.read(write(checkpoint), CODEBOOKS)


def test_a_missing_key_is_named(checkpoint, write):
    del checkpoint["state_dict"][f"{QUERY}.weight"]
    with pytest.raises(InputError, match=rf"missing {QUERY}\.weight"):
        pth.read(write(checkpoint), CODEBOOKS)


def test_a_missing_half_of_an_adapter_is_named(checkpoint, write):
    del checkpoint["state_dict"][f"{QUERY}.lora_B"]
    with pytest.raises(InputError, match=rf"missing {QUERY}\.lora_B"):
        pth.read(write(checkpoint), CODEBOOKS)


def test_unknown_keys_are_named(checkpoint, write):
    checkpoint["state_dict"]["ctrl_encoder.weight"] = torch.zeros(3)
    with pytest.raises(InputError, match=r"unknown ctrl_encoder\.weight"):
        pth.read(write(checkpoint), CODEBOOKS)


@pytest.mark.parametrize(
    ("key", "shape"), [(f"{QUERY}.weight", "[32, 64]"), (f"{QUERY}.lora_B", "[32, 8]")]
)
def test_a_misshapen_tensor_is_named(checkpoint, write, key, shape):
    checkpoint["state_dict"][key] = checkpoint["state_dict"][key][:32].clone()
    with pytest.raises(InputError) as error:
        pth.read(write(checkpoint), CODEBOOKS)
    assert key in str(error.value)
    assert shape in str(error.value)


@pytest.mark.parametrize("name", ["n_layers", "n_heads", "embedding_dim", "n_codebooks"])
def test_sizes_that_the_arrays_do_not_have_are_refused(checkpoint, write, name):
    checkpoint["metadata"]["kwargs"][name] *= 2
    with pytest.raises(InputError, match="sizes in its metadata"):
        pth.read(write(checkpoint), CODEBOOKS)


@pytest.mark.parametrize("value", [None, "4", 10**12, -1, 4.0, True])
def test_impossible_sizes_are_refused(checkpoint, write, value):
    checkpoint["metadata"]["kwargs"]["n_layers"] = value
    with pytest.raises(InputError, match="n_layers"):
        pth.read(write(checkpoint), CODEBOOKS)


@pytest.mark.parametrize(
    ("name", "value"),
    [("ctrl_dims", {"rms": 1}), ("flash_attn", True), ("r_cond_dim", 64), ("cond_dim", 8)],
)
def test_metadata_that_changes_the_model_is_refused(checkpoint, write, name, value):
    checkpoint["metadata"]["kwargs"][name] = value
    with pytest.raises(InputError, match=name):
        pth.read(write(checkpoint), CODEBOOKS)


def test_messages_stay_one_sentence_whatever_the_file_says(checkpoint, write):
    checkpoint["state_dict"]["line\n\x1b[2J" + "x" * 1000] = torch.zeros(1)
    with pytest.raises(InputError) as error:
        pth.read(write(checkpoint), CODEBOOKS)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 400
    checkpoint["metadata"]["kwargs"]["cond_dim"] = torch.zeros(9, 9)
    with pytest.raises(InputError) as error:
        pth.read(write(checkpoint), CODEBOOKS)
    assert str(error.value).isprintable()


def test_other_unknown_metadata_is_ignored(checkpoint, write):
    plain = pth.read(write(checkpoint), CODEBOOKS)
    checkpoint["metadata"]["kwargs"]["colour"] = "blue"
    for name in pth.UNSUPPORTED:
        del checkpoint["metadata"]["kwargs"][name]
    assert equal(pth.read(write(checkpoint), CODEBOOKS).params, plain.params)


@pytest.mark.parametrize(
    "content",
    [[1, 2], torch.zeros(2), {"state_dict": {}}, {"state_dict": {"a": torch.zeros(2)}}],
)
def test_a_file_of_another_kind_is_refused(write, content):
    with pytest.raises(InputError, match=r"no checkpoint|no state_dict"):
        pth.read(write(content), CODEBOOKS)


def test_a_bare_state_dict_without_sizes_is_refused(checkpoint, write):
    with pytest.raises(InputError, match="no 'kwargs'"):
        pth.read(write(checkpoint["state_dict"]), CODEBOOKS)


def test_a_head_without_a_direction_is_refused(checkpoint, write):
    checkpoint["state_dict"]["classifier.layers.0.weight_v"][3] = 0
    with pytest.raises(InputError, match="row of zeros"):
        pth.read(write(checkpoint), CODEBOOKS)


def test_values_that_are_no_numbers_are_refused(checkpoint, write):
    checkpoint["state_dict"][f"{QUERY}.weight"][0, 0] = torch.nan
    with pytest.raises(InputError, match=rf"{QUERY}\.weight holds NaN"):
        pth.read(write(checkpoint), CODEBOOKS)


def test_tensors_larger_than_the_file_are_refused(checkpoint, write):
    state = checkpoint["state_dict"]
    for key, tensor in state.items():
        state[key] = torch.zeros(1).expand(tensor.shape)
    with pytest.raises(InputError, match="bytes in a file of"):
        pth.read(write(checkpoint), CODEBOOKS)


def test_a_codec_of_other_codebooks_is_refused(checkpoint, write):
    for codebooks in (CODEBOOKS[:3], CODEBOOKS[:, :100], CODEBOOKS[:, :, :4]):
        with pytest.raises(InputError, match="give the codec that it was trained with"):
            pth.read(write(checkpoint), codebooks)


def test_half_precision_files_are_read_as_float32(checkpoint, write):
    state = checkpoint["state_dict"]
    checkpoint["state_dict"] = {key: value.bfloat16().float() for key, value in state.items()}
    rounded = pth.read(write(checkpoint), CODEBOOKS)
    checkpoint["state_dict"] = {key: value.bfloat16() for key, value in state.items()}
    assert equal(pth.read(write(checkpoint), CODEBOOKS).params, rounded.params)


def test_adapters_are_merged_as_the_original_does(checkpoint, write):
    params = pth.read(write(checkpoint), CODEBOOKS).params
    state = checkpoint["state_dict"]
    merged = state[f"{QUERY}.weight"] + state[f"{QUERY}.lora_B"] @ state[f"{QUERY}.lora_A"] / 8
    assert torch.any(state[f"{QUERY}.lora_B"] != 0)
    query = params["blocks"]["query"][1].reshape(64, 64).T
    np.testing.assert_allclose(query, merged.numpy(), rtol=0, atol=1e-6)


def test_kept_adapters_merge_to_the_same_weights(checkpoint, write):
    path = write(checkpoint)
    merged = pth.read(path, CODEBOOKS).params
    kept = pth.read(path, CODEBOOKS, keep_lora=True)
    assert not np.allclose(kept.params["blocks"]["query"], merged["blocks"]["query"], atol=1e-3)
    ours = lora.merge(kept.params, kept.adapters, kept.lora_config)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), ours, merged)


def test_a_fine_tunes_adapters_replace_the_checkpoints_own(checkpoint, write, tmp_path):
    whole = pth.read(write(checkpoint), CODEBOOKS).params
    state = checkpoint["state_dict"]
    adapters = {key: value.clone() for key, value in state.items() if "lora_" in key}
    torch.save(adapters, tmp_path / "lora.pth")
    for key in adapters:
        state[key] += 1.0
    other = write(checkpoint)
    assert not equal(pth.read(other, CODEBOOKS).params, whole)
    assert equal(pth.read(other, CODEBOOKS, lora_path=tmp_path / "lora.pth").params, whole)


def test_a_fine_tunes_file_holds_adapters_alone_and_all_of_them(checkpoint, write, tmp_path):
    base = write(checkpoint)
    adapters = {k: v for k, v in checkpoint["state_dict"].items() if "lora_" in k}
    for content, message in (
        (checkpoint["state_dict"], "unknown embedding"),
        (dict(list(adapters.items())[:-1]), "missing transformer"),
        ({"a": torch.zeros(1)}, "no LoRA matrices"),
    ):
        torch.save(content, tmp_path / "lora.pth")
        with pytest.raises(InputError, match=message):
            pth.read(base, CODEBOOKS, lora_path=tmp_path / "lora.pth")


def test_a_checkpoint_without_adapters_is_read_too(checkpoint, write):
    state = checkpoint["state_dict"]
    checkpoint["state_dict"] = {key: value for key, value in state.items() if "lora_" not in key}
    bare = pth.read(write(checkpoint), CODEBOOKS, keep_lora=True)
    assert bare.adapters is None
    query = bare.params["blocks"]["query"][1].reshape(64, 64).T
    np.testing.assert_array_equal(query, state[f"{QUERY}.weight"].numpy())


@pytest.mark.parametrize("n_heads", [2, 8])
@pytest.mark.parametrize("vocab_size", [16, 100])
def test_other_sizes_come_back_from_a_file(tmp_path, n_heads, vocab_size):
    config = ModelConfig(5, 2, 2, n_heads, 16, vocab_size, latent_dim=3)
    codebooks = np.ones((6, vocab_size, 3), np.float32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(1), config, jnp.asarray(codebooks)))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    params["embedding"]["codebooks"] = codebooks[:5]
    params["head"]["kernel"][:, 1, 2] = 0  # a row without a direction
    torch.save(pth.export(params, config), tmp_path / "other.pth")
    back = pth.read(tmp_path / "other.pth", codebooks)
    assert back.config == config
    assert equal(back.params, params)


MEASURE = """
import re, sys
import numpy as np
from vampnet_jax import from_torch
golden, checkpoint, codec = sys.argv[1:]
from_torch(golden, codec)  # load all libraries
np.ones(3 << 20)  # 25 MB that were freed: the C library now keeps smaller ones
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
status = lambda name: int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
before = status("VmRSS")
from_torch(checkpoint, codec)
print((status("VmHWM") - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux counts it")
def test_reading_needs_less_than_one_and_a_half_times_the_files_memory(tmp_path):
    config = ModelConfig(4, 0, 12, 4, 512, 256)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(1), config, jnp.asarray(CODEBOOKS)))
    params = jax.tree.map(lambda x: np.full(x.shape, 0.5, np.float32), shapes)
    path = tmp_path / "large.pth"
    torch.save(pth.export(params, config), path)
    assert path.stat().st_size > 100e6
    command = [sys.executable, "-c", MEASURE, GOLDEN / "coarse.pth", path, GOLDEN / "codec.pth"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 1.5 * path.stat().st_size


def test_what_a_file_says_is_shown_short_however_large_it_is():
    """A small pickle can hold a list of lists of lists whose text would fill the memory."""
    from vampnet_jax.pth import _shown

    value = "x" * 10
    for _ in range(12):
        value = [value] * 10
    assert len(_shown(value)) <= 80
    assert _shown("embedding.\nweight\x00") == "embedding. weight?"
