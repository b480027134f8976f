"""Codec files: what is read, what is refused, and that nothing in them ever runs."""

import json
import pickle
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from small_codecs import SMALL, random_codec

import codec_bridge
from codec_bridge import InputError, files
from codec_bridge.config import CodecConfig
from codec_bridge.descript import import_dac
from codec_bridge.network import _without_weights, tensor_shapes
from codec_bridge.pth import fold_weight_norm, read_pth, weight_norm

LAC_PTH = Path(__file__).parent / "golden" / "codec.pth"


@pytest.fixture(scope="module")
def descript_model():
    """descript-audio-codec's own class, untrained, with odd strides and biases that matter."""
    torch.manual_seed(0)
    sizes = {**SMALL, "encoder_rates": [2, 4, 5], "decoder_rates": [5, 4, 2]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = import_dac().DAC(**sizes).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight_v"):
                parameter.normal_()
            elif name.endswith("weight_g"):
                # Strong residual branches would make rounding errors grow.
                width = model.get_parameter(name.replace("weight_g", "weight_v")).shape[:2]
                gain = 0.3 if width[0] == width[1] else 1.0
                parameter.uniform_(0.5 * gain, gain)
            elif name.endswith("bias"):
                parameter.normal_(std=0.05)
    return model


@pytest.fixture(scope="module")
def descript_pth(descript_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("descript") / "weights.pth"
    descript_model.save(path, package=False)
    return path


def lac_checkpoint():
    return torch.load(LAC_PTH, weights_only=True)


def damaged_lac(tmp_path, change):
    checkpoint = lac_checkpoint()
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "codec.pth")
    return tmp_path / "codec.pth"


@torch.no_grad()
def test_a_descript_file_works_as_in_descript_audio_codec(descript_model, descript_pth):
    codec = codec_bridge.load(descript_pth, device="cpu")
    assert codec.kind == "dac"
    audio = 0.3 * torch.randn(2, 1, 4000, generator=torch.Generator().manual_seed(1))
    tokens = descript_model.encode(audio)[1]
    np.testing.assert_array_equal(codec.encode(audio[:, 0].numpy()), tokens)
    expected = descript_model.decode(descript_model.quantizer.from_codes(tokens)[0])[:, 0]
    assert expected.shape[1] < 4000  # stride 5 loses some samples
    sound = np.asarray(codec.decode(tokens.numpy()))
    assert sound.shape == (2, 4000)
    np.testing.assert_allclose(sound[:, : expected.shape[1]], expected, atol=1e-5)
    assert (sound[:, expected.shape[1] :] == 0).all()


def test_both_namings_of_weight_norm_and_compiled_models_are_the_same_codec(tmp_path):
    expected = codec_bridge.load(LAC_PTH).fingerprint
    checkpoint = lac_checkpoint()
    new = {"weight_g": "parametrizations.weight.original0"}
    new["weight_v"] = "parametrizations.weight.original1"
    renamed = {}
    for key, tensor in checkpoint["state_dict"].items():
        stem, _, last = key.rpartition(".")
        renamed[f"_orig_mod.{stem}.{new.get(last, last)}"] = tensor
    torch.save({**checkpoint, "state_dict": renamed}, tmp_path / "codec.pth")
    assert codec_bridge.load(tmp_path / "codec.pth").fingerprint == expected


def test_a_folded_checkpoint_is_the_same_codec(tmp_path):
    codec = codec_bridge.load(LAC_PTH)
    state = {name: torch.from_numpy(tensor) for name, tensor in codec.tensors.items()}
    torch.save({**lac_checkpoint(), "state_dict": state}, tmp_path / "codec.pth")
    assert codec_bridge.load(tmp_path / "codec.pth").fingerprint == codec.fingerprint


def test_folding_agrees_with_pytorch_and_gives_a_folded_weight_back_bit_for_bit():
    rng = np.random.default_rng(0)
    direction = rng.standard_normal((64, 33, 7)).astype(np.float32)
    magnitude = rng.uniform(0.1, 3, (64, 1, 1)).astype(np.float32)
    folded = fold_weight_norm(direction, magnitude)
    expected = torch._weight_norm(torch.from_numpy(direction), torch.from_numpy(magnitude), 0)
    np.testing.assert_allclose(folded, expected, rtol=1e-6)
    np.testing.assert_array_equal(fold_weight_norm(folded, weight_norm(folded)), folded)


@pytest.mark.parametrize("kind", ["dac", "lac"])
def test_save_and_load_give_the_same_codec(tmp_path, kind):
    codec = random_codec(kind)
    files.save(codec, tmp_path / "codec.safetensors")
    loaded = files.load(tmp_path / "codec.safetensors")
    assert (loaded.kind, loaded.config) == (codec.kind, codec.config)
    assert loaded.fingerprint == codec.fingerprint
    np.testing.assert_array_equal(loaded.codebooks, codec.codebooks)


def test_bfloat16_files_are_half_the_size_and_act_as_the_rounded_weights(tmp_path):
    codec = random_codec("dac", encoder_dim=8, decoder_dim=64)
    files.save(codec, tmp_path / "whole.safetensors")
    files.save(codec, tmp_path / "half.safetensors", dtype="bfloat16")
    whole, half = ((tmp_path / f"{name}.safetensors").stat().st_size for name in ("whole", "half"))
    assert half < 0.6 * whole
    rounded = {
        name: torch.from_numpy(t).bfloat16().float().numpy() for name, t in codec.tensors.items()
    }
    expected = codec_bridge.Codec("dac", codec.config, rounded, device="cpu")
    loaded = files.load(tmp_path / "half.safetensors", device="cpu")
    assert loaded.fingerprint == expected.fingerprint != codec.fingerprint
    tokens = np.random.default_rng(0).integers(0, 64, (1, 8, 10))
    np.testing.assert_array_equal(loaded.decode(tokens), expected.decode(tokens))
    # Rounding again changes nothing.
    files.save(loaded, tmp_path / "again.safetensors", dtype="bfloat16")
    assert files.load(tmp_path / "again.safetensors").fingerprint == expected.fingerprint
    with pytest.raises(InputError, match="float16"):
        files.save(codec, tmp_path / "c.safetensors", dtype="float16")


def test_attributes_and_codebooks_of_a_saved_codec_need_no_torch(tmp_path):
    files.save(random_codec("dac"), tmp_path / "codec.safetensors")
    code = (
        "import sys, codec_bridge\n"
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules\n"
        f"codec = codec_bridge.load({str(tmp_path)!r})\n"
        "assert (codec.hop_length, codec.codebooks.shape) == (64, (8, 64, 8))\n"
        "assert len(codec.fingerprint) == 64\n"
        "loaded = {'torch', 'dac', 'audiotools', 'librosa', 'soundfile'} & sys.modules.keys()\n"
        "assert not loaded, loaded\n"
        "import numpy\n"
        "codec.decode(numpy.zeros((1, 8, 4), numpy.int32))\n"
        "slow = {'torch._dynamo', 'torch._inductor', 'sympy'} & sys.modules.keys()\n"
        "assert 'torch' in sys.modules and not slow, slow  # seconds of imports\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_networks_are_built_without_memory_and_leave_descripts_layers_as_they_were():
    before = import_dac().nn.layers.weight_norm
    network = _without_weights("dac", random_codec("dac").config)
    assert import_dac().nn.layers.weight_norm is before
    assert all(tensor.is_meta for tensor in network.state_dict().values())
    assert not any("weight_g" in name for name in network.state_dict())


def test_released_weights_come_through_descripts_download(monkeypatch, descript_pth):
    asked = []

    def download(**options):
        asked.append(options)
        return descript_pth

    monkeypatch.setattr(import_dac().utils, "download", download)
    assert codec_bridge.load("24khz").kind == "dac"
    assert asked == [{"model_type": "24khz", "model_bitrate": "8kbps"}]


@pytest.mark.parametrize("failure", [OSError("no route to host"), ValueError("response code 404")])
def test_being_offline_is_said_clearly(monkeypatch, failure):
    def download(**_):
        raise failure

    monkeypatch.setattr(import_dac().utils, "download", download)
    with pytest.raises(InputError, match=r"16khz could not be downloaded.*online"):
        codec_bridge.load("16khz")


def test_unknown_names_and_missing_files_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"48khz.*44khz"):
        codec_bridge.load("48khz")
    with pytest.raises(InputError, match=r"codec\.safetensors"):
        codec_bridge.load(tmp_path)
    with pytest.raises(InputError, match="no file"):
        read_pth(tmp_path / "a.pth")
    with pytest.raises(InputError, match="not a file"):
        read_pth(tmp_path)


BIAS = "decoder.model.0.bias"
FIRST = "encoder.block.0"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c["state_dict"].pop(BIAS), f"{BIAS} is missing"),
        (lambda c: c["state_dict"].update({"stray": torch.ones(3)}), "stray is unknown"),
        (lambda c: c["state_dict"].update({BIAS: torch.ones(3)}), f"{BIAS} has shape"),
        (lambda c: c["state_dict"].update({BIAS: torch.ones(32).int()}), f"{BIAS} is torch.int32"),
        (lambda c: c["state_dict"].update({BIAS: torch.full((32,), torch.nan)}), "not finite"),
        (lambda c: c["state_dict"].pop(f"{FIRST}.weight_v"), f"without {FIRST}.weight_v"),
        (
            lambda c: c["state_dict"].update({f"{FIRST}.weight_g": torch.ones(5, 1, 1)}),
            "do not fit together",
        ),
        (
            lambda c: c["state_dict"].update({"encoder.block.0.weight": torch.ones(8, 1, 7)}),
            "twice",
        ),
        (lambda c: c["state_dict"].update({f"_orig_mod.{BIAS}": torch.ones(32)}), "twice"),
        (lambda c: c["metadata"]["kwargs"].update(n_codebooks=13), "unknown"),
        (lambda c: c["metadata"]["kwargs"].update(n_codebooks=15), "missing"),
        (lambda c: c["metadata"]["kwargs"].update(codebook_size=128), "has shape"),
        (lambda c: c["metadata"]["kwargs"].pop("sample_rate"), "lacks sample_rate"),
        (lambda c: c["metadata"]["kwargs"].update(encoder_rates="fast"), "encoder_rates"),
        (lambda c: c.pop("metadata"), "not a codec"),
        (lambda c: c.update(state_dict=[1, 2]), "no state_dict"),
        (lambda c: c["state_dict"].update({"number": 3}), "number"),
        (lambda c: c["state_dict"].update({BIAS: torch.ones(32).to_sparse()}), BIAS),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, change, says):
    path = damaged_lac(tmp_path, change)
    with pytest.raises(InputError) as caught:
        codec_bridge.load(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_bare_dictionary_of_tensors_is_a_checkpoint_without_metadata(tmp_path):
    torch.save({"lora_A": torch.ones(2)}, tmp_path / "lora.pth")
    checkpoint = read_pth(tmp_path / "lora.pth")
    assert checkpoint["metadata"] == {}
    assert checkpoint["state_dict"]["lora_A"].tolist() == [1, 1]


class Hostile:
    """Unpickled freely, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def hostile_checkpoint(path, mark):
    torch.save({"state_dict": {"a": torch.ones(1)}, "metadata": Hostile(mark)}, path)


def hostile_legacy_checkpoint(path, mark):
    torch.save({"a": Hostile(mark)}, path, _use_new_zipfile_serialization=False)


def hostile_pickle(path, mark):
    path.write_bytes(pickle.dumps(Hostile(mark)))


def hostile_package(path, mark):
    with torch.package.PackageExporter(path) as package:
        package.save_source_string("harmful", f"import pathlib\npathlib.Path({mark!r}).touch()\n")
        package.save_pickle("model", "model.pkl", {"a": torch.ones(1)})


def hostile_script(path, mark):
    class Doubler(torch.nn.Module):
        def forward(self, x):
            return 2 * x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Doubler()), path)


@pytest.mark.parametrize(
    "make",
    [
        hostile_checkpoint,
        hostile_legacy_checkpoint,
        hostile_pickle,
        hostile_package,
        hostile_script,
    ],
)
@pytest.mark.parametrize("reader", [read_pth, codec_bridge.load])
def test_files_that_hold_code_are_refused_and_run_nothing(tmp_path, make, reader):
    path, mark = tmp_path / "codec.pth", tmp_path / "ran"
    make(path, str(mark))
    with pytest.raises(InputError) as caught:
        reader(path)
    assert not mark.exists()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)  # PyTorch's advice to switch safety off


def repack(path, change):
    """Rewrite an archive entry by entry: change(name, content) -> (content, compression)."""
    with zipfile.ZipFile(path) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries:
            content, compression = change(name, content)
            archive.writestr(name, content, compression)


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    path = tmp_path / "codec.pth"
    torch.save({"a": torch.zeros(2**22)}, path)
    repack(path, lambda name, content: (content, zipfile.ZIP_DEFLATED))
    assert path.stat().st_size < 2**20
    with pytest.raises(InputError, match="packed unlike"):
        read_pth(path)


def test_entries_that_overlap_are_refused(tmp_path):
    path = tmp_path / "codec.pth"
    torch.save({"a": torch.zeros(2**16), "b": torch.ones(2**16)}, path)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        infos = {info.filename.rpartition("/")[2]: info for info in archive.infolist()}
        start = archive.start_dir
    # The central directory's entry of data/1 gets the offset of data/0's data.
    directory = bytearray(content[start:])
    offset = infos["1"].header_offset.to_bytes(4, "little")
    place = directory.index(offset, directory.index(infos["1"].filename.encode()) - 8)
    directory[place : place + 4] = infos["0"].header_offset.to_bytes(4, "little")
    path.write_bytes(content[:start] + directory)
    with pytest.raises(InputError):
        read_pth(path)


def test_a_view_that_repeats_one_number_is_refused(tmp_path):
    path = tmp_path / "codec.pth"
    torch.save({"a": torch.zeros(1).expand(2**40)}, path)
    with pytest.raises(InputError, match="claims"):
        read_pth(path)


def test_a_huge_table_of_contents_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "codec.pth"
    torch.save({"a": torch.zeros(1), "text": "x" * 5000}, path)
    monkeypatch.setattr("codec_bridge.pth.MAX_PICKLE_BYTES", 4000)
    with pytest.raises(InputError, match="table of contents"):
        read_pth(path)


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n" * 99, b"PK\x03\x04" + b"\0" * 99])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "codec.pth"
    path.write_bytes(content)
    for reader in (read_pth, codec_bridge.load):
        with pytest.raises(InputError, match=r"codec\.pth"):
            reader(path)


def test_an_npz_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.ones(3))
    with pytest.raises(InputError, match="not a PyTorch checkpoint"):
        codec_bridge.load(tmp_path / "a.npz")


@pytest.fixture(scope="module")
def small_pth(tmp_path_factory):
    codec = random_codec("dac", n_codebooks=2, encoder_rates=(2,), decoder_rates=(2,))
    path = tmp_path_factory.mktemp("small") / "codec.pth"
    kwargs = json.loads(codec.config.to_json())
    state = {name: torch.from_numpy(t) for name, t in codec.tensors.items()}
    torch.save({"state_dict": state, "metadata": {"kwargs": kwargs}}, path)
    return path


def damages(content):
    rng = np.random.default_rng(0)
    for length in rng.integers(0, len(content), 20):
        yield content[:length]
    for place in rng.integers(0, len(content), 60):
        flipped = bytearray(content)
        flipped[place] ^= 1 << rng.integers(8)
        yield bytes(flipped)


def test_truncated_and_bit_flipped_pth_files_are_refused(small_pth, tmp_path):
    intact = codec_bridge.load(small_pth).fingerprint
    path, outcomes = tmp_path / "codec.pth", []
    for content in damages(small_pth.read_bytes()):
        path.write_bytes(content)
        try:
            outcomes.append(codec_bridge.load(path).fingerprint)
        except InputError as error:
            outcomes.append(str(error))
    refused = [outcome for outcome in outcomes if str(path) in outcome]
    # What is not refused was flipped in the padding between entries, which means nothing.
    assert set(outcomes) - set(refused) <= {intact}
    assert len(refused) > 40


def test_truncated_and_bit_flipped_safetensors_files_are_refused(small_pth, tmp_path):
    path = tmp_path / "codec.safetensors"
    files.save(codec_bridge.load(small_pth), path)
    for content in damages(path.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"codec\.safetensors"):
            codec_bridge.load(path)


def test_foreign_safetensors_and_newer_formats_are_refused(tmp_path):
    path = tmp_path / "codec.safetensors"
    safetensors.numpy.save_file({"a": np.ones(3, np.float32)}, path)
    with pytest.raises(InputError, match="not a codec file"):
        codec_bridge.load(path)
    files.save(random_codec("dac"), path)
    with safetensors.safe_open(path, "np") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata["format_version"] = "2"
    safetensors.numpy.save_file(tensors, path, metadata)
    with pytest.raises(InputError, match="version 2"):
        codec_bridge.load(path)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    codec = random_codec("dac")
    path = tmp_path / "codec.safetensors"
    files.save(codec, path)
    before = path.read_bytes()

    def broken(tensors, name, metadata):
        Path(name).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", broken)
    with pytest.raises(InputError, match="No space left"):
        files.save(codec, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match="does not exist"):
        files.save(codec, tmp_path / "missing" / "codec.safetensors")


def test_the_configuration_adapts_to_any_codec_of_descript():
    # The sizes of the released 24 kHz weights: 32 codebooks, hop 320.
    sizes = {
        "encoder_dim": 64,
        "encoder_rates": [2, 4, 5, 8],
        "decoder_dim": 1536,
        "decoder_rates": [8, 5, 4, 2],
        "n_codebooks": 32,
        "codebook_size": 1024,
        "codebook_dim": 8,
        "sample_rate": 24000,
    }
    config = CodecConfig.from_kwargs({**sizes, "latent_dim": None})
    shapes = tensor_shapes("dac", config)
    assert config.hop_length == 320
    assert shapes["quantizer.quantizers.31.codebook.weight"] == (1024, 8)
