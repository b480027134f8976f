"""Checkpoints from strangers are read or refused with one sentence; they never run code."""

import io
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from codec_bridge.errors import InputError
from vampnet_jax import cli, from_torch, pth

GOLDEN = Path(__file__).parent / "golden"
COARSE, CODEC = GOLDEN / "coarse.pth", GOLDEN / "codec.pth"


class Payload:
    """An object whose unpickling makes a directory."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def plain_pickle(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps({"state_dict": Payload(marker)}))


def legacy_checkpoint(path: Path, marker: Path) -> None:
    torch.save({"state_dict": Payload(marker)}, path, _use_new_zipfile_serialization=False)


def checkpoint(path: Path, marker: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(2)}, "metadata": Payload(marker)}, path)


def checkpoint_that_imports(path: Path, marker: Path) -> None:
    """Names a module of the attacker's beside the file, which an import would run."""
    (path.parent / "stowaway.py").write_text(
        f"import os\nos.mkdir({str(marker)!r})\nclass A: ...\n"
    )
    contents = b"\x80\x02cstowaway\nA\n."
    edit(COARSE, path, lambda name, data: contents if name.endswith("data.pkl") else data)


def package(path: Path, marker: Path) -> None:
    from torch.package import PackageExporter

    (path.parent / "stowaway.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    with PackageExporter(path) as exporter:
        exporter.save_source_file("stowaway", str(path.parent / "stowaway.py"))
        exporter.save_pickle("model", "model.pkl", {"state_dict": {}})


def script(path: Path, marker: Path) -> None:
    """As TorchScript writes: a checkpoint with source code beside the tensors."""
    shutil.copy(COARSE, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("coarse/code/__torch__.py", f"import os\nos.mkdir({str(marker)!r})\n")


def zip_bomb(path: Path, marker: Path) -> None:
    """Compressed records that unpack to a thousand times the file."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        state = {"state_dict": {"a": torch.zeros(16)}, "metadata": {"kwargs": {}}}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        with zipfile.ZipFile(buffer) as original:
            for name in original.namelist():
                big = b"\0" * (1 << 28) if "/data/" in name else original.read(name)
                archive.writestr(name, big)


def overlapping_bomb(path: Path, marker: Path) -> None:
    """A small file whose tensors claim a terabyte."""
    content = torch.load(COARSE, weights_only=True)
    for key in content["state_dict"]:
        content["state_dict"][key] = torch.zeros(1).expand(1 << 20, 1 << 18)
    torch.save(content, path)


def truncated(path: Path, marker: Path) -> None:
    path.write_bytes(COARSE.read_bytes()[:-1000])


def cut_short(path: Path, marker: Path) -> None:
    path.write_bytes(COARSE.read_bytes()[:100])


def empty(path: Path, marker: Path) -> None:
    path.write_bytes(b"")


def text(path: Path, marker: Path) -> None:
    path.write_text("these are not the weights you are looking for")


FILES: list[Callable[[Path, Path], None]] = [
    plain_pickle,
    legacy_checkpoint,
    checkpoint,
    checkpoint_that_imports,
    package,
    script,
    zip_bomb,
    overlapping_bomb,
    truncated,
    cut_short,
    empty,
    text,
]


@pytest.fixture(params=FILES, ids=lambda make: make.__name__)
def hostile(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch) -> Path:
    """A file that must be refused; the test fails if anything in it ran."""
    path, marker = tmp_path / "hostile.pth", tmp_path / "marker"
    monkeypatch.syspath_prepend(str(tmp_path))
    request.param(path, marker)
    yield path
    assert not marker.exists()
    assert "stowaway" not in sys.modules


def test_the_payloads_are_real(tmp_path):
    """Without the precautions they would run; otherwise the tests here would prove nothing."""
    checkpoint(tmp_path / "a.pth", tmp_path / "marker")
    torch.load(tmp_path / "a.pth", weights_only=False)
    assert (tmp_path / "marker").is_dir()


def test_as_a_checkpoint_it_is_refused(hostile):
    with pytest.raises(InputError) as error:
        from_torch(hostile, CODEC)
    assert_one_sentence(str(error.value))


def test_as_a_codec_it_is_refused(hostile):
    with pytest.raises(InputError) as error:
        from_torch(COARSE, hostile)
    assert_one_sentence(str(error.value))


def test_as_adapters_it_is_refused(hostile):
    with pytest.raises(InputError) as error:
        from_torch(COARSE, CODEC, lora_path=hostile)
    assert_one_sentence(str(error.value))


def test_the_command_line_exits_with_2_and_writes_nothing(hostile, capsys):
    out = hostile.parent / "model"
    arguments = ["--coarse", str(hostile), "--fine", str(COARSE), "--codec", str(CODEC)]
    with pytest.raises(SystemExit) as exit_:
        cli.main(["import", str(out), *arguments])
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    assert not out.exists()


@pytest.mark.parametrize("seed", range(20))
def test_a_flipped_bit_never_changes_a_weight_unnoticed(tmp_path, seed):
    data = bytearray(COARSE.read_bytes())
    rng = np.random.default_rng(seed)
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    (tmp_path / "flipped.pth").write_bytes(data)
    codebooks = np.zeros((14, 256, 8), np.float32)
    try:
        flipped = pth.read(tmp_path / "flipped.pth", codebooks)
    except InputError as error:
        assert_one_sentence(str(error))
    else:  # the bit was in padding between the records
        whole = pth.read(COARSE, codebooks)
        assert flipped.config == whole.config
        for name, array in whole.params["blocks"].items():
            np.testing.assert_array_equal(flipped.params["blocks"][name], array)


@pytest.mark.parametrize("which", ["data.pkl", "data/0", "data/40"])
def test_a_flipped_bit_in_a_record_is_noticed(tmp_path, which):
    path = tmp_path / "flipped.pth"
    shutil.copy(COARSE, path)
    with zipfile.ZipFile(path) as archive:
        info = next(i for i in archive.infolist() if i.filename.endswith(which))
    with open(path, "r+b") as file:
        file.seek(info.header_offset + 28)
        extra = int.from_bytes(file.read(2), "little")
        start = info.header_offset + 30 + len(info.filename) + extra
        file.seek(start + info.file_size // 2)
        byte = file.read(1)[0]
        file.seek(start + info.file_size // 2)
        file.write(bytes([byte ^ 4]))
    with pytest.raises(InputError, match="damaged"):
        pth.read(path, np.zeros((14, 256, 8), np.float32))


def edit(source: Path, path: Path, change: Callable[[str, bytes], bytes]) -> None:
    """Copy a checkpoint with some records changed."""
    with zipfile.ZipFile(source) as original, zipfile.ZipFile(path, "w") as archive:
        for name in original.namelist():
            archive.writestr(name, change(name, original.read(name)))


def assert_one_sentence(message: str) -> None:
    assert 20 < len(message) < 400
    assert "\n" not in message
