"""Token folders in cloud storage are copied once, and again where they changed."""

import json

import fsspec
import numpy as np
import pytest
from small_tokens import reader, write_folder

from codec_bridge import InputError
from vampnet_jax.cli import run as run_command
from vampnet_jax.cli.train import main as train
from vampnet_jax.training import remote
from vampnet_jax.training.tokens import read_manifest

ADDRESS = "memory://bucket/tokens"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def storage():
    storage = fsspec.filesystem("memory")
    yield storage
    storage.rm("/bucket", recursive=True)


@pytest.fixture
def tokens(tmp_path, storage, cache):
    write_folder(tmp_path / "tokens", [60, 60, 200])
    storage.put(str(tmp_path / "tokens"), "/bucket/tokens", recursive=True)
    return tmp_path / "tokens"


def test_a_folder_is_copied_once_and_reads_as_the_original_does(tokens):
    said = []
    copy = remote.local(ADDRESS, say=said.append)
    assert len(said) == 2  # the manifest and codebooks, then the shard
    assert read_manifest(copy) == read_manifest(tokens)
    np.testing.assert_array_equal(
        reader(copy).read(0, 0, 200)[0], reader(tokens).read(0, 0, 200)[0]
    )
    assert remote.local(ADDRESS + "/", say=said.append) == copy
    assert len(said) == 2
    assert remote.local(tokens, say=said.append) == tokens


def test_what_changed_is_copied_again_and_what_is_gone_goes(tokens, storage, tmp_path):
    copy = remote.local(ADDRESS)
    (copy / "tokens-00007.arrayrecord").touch()  # of a manifest before
    write_folder(tmp_path / "more", [60, 60, 200, 300])
    storage.put(str(tmp_path / "more") + "/", "/bucket/tokens/", recursive=True)
    assert remote.local(ADDRESS) == copy
    assert len(read_manifest(copy).tracks) == 4
    assert reader(copy).read(1, 0, 300)[0].shape == (3, 300)
    assert not (copy / "tokens-00007.arrayrecord").exists()
    (copy / "tokens-00000.arrayrecord").unlink()  # as a cleaner of caches does
    remote.local(ADDRESS)
    assert reader(copy).read(1, 0, 300)[0].shape == (3, 300)


def test_an_interrupted_copy_is_not_taken_for_a_whole_one(tokens, storage, monkeypatch):
    get_file = type(storage).get_file

    def fail(self, path, local, **options):
        if "arrayrecord" in path:
            raise ConnectionError("gone")
        get_file(self, path, local, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(storage), "get_file", fail)
        with pytest.raises(InputError, match=r"arrayrecord cannot be copied .*gone"):
            remote.local(ADDRESS)
    copy = remote.local(ADDRESS)
    assert reader(copy).read(0, 0, 200)[0].shape == (3, 200)
    assert {path.name for path in copy.iterdir() if path.name.startswith(".")} <= {".lock"}


def test_what_is_no_token_folder_or_cannot_be_reached_is_one_sentence(tokens, storage, capsys):
    storage.pipe("/bucket/other/song.wav", b"no tokens")
    for address, words in (
        ("memory://bucket/other", "is no token folder"),
        ("memory://bucket/nowhere", "cannot be listed"),
        ("nothing://bucket/tokens", "cannot be opened"),
    ):
        with pytest.raises(InputError, match=words):
            remote.local(address)
    content = json.loads(storage.cat("/bucket/tokens/manifest.json"))
    content["tracks"][0]["shard"] = "../../secret"
    storage.pipe("/bucket/tokens/manifest.json", json.dumps(content).encode())
    with pytest.raises(InputError, match="no possible record"):
        remote.local(ADDRESS)
    with pytest.raises(SystemExit) as stop:
        run_command("train", [ADDRESS, "--out", str(tokens.parent / "run"), "--steps=1"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: ")


def test_a_missing_package_is_named(monkeypatch, cache):
    def no_package(address):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec.core, "url_to_fs", no_package)
    with pytest.raises(InputError, match=r"gs:// needs another package .*vampnet-jax\[cloud\]"):
        remote.local("gs://bucket/tokens")


def test_a_run_trains_and_continues_from_an_address(tokens, tmp_path):
    run = tmp_path / "run"
    small = ["--n-codebooks=2", "--n-layers=1", "--n-heads=2", "--embedding-dim=16"]
    options = ["--window-seconds=2", "--batch-size=2", "--steps=1", "--seed=1", *small]
    weights = ["--source-weight", "source0=2"]
    assert train([ADDRESS, "--out", str(run), *options, *weights]) == 0
    config = json.loads((run / "config.json").read_text())
    assert config["data"] == ADDRESS
    assert config["training"]["source_weights"] == [["source0", 2.0]]
    assert train(["--out", str(run), "--steps=2"]) == 0
