"""Fetching the official weights: pinned, checked, converted once. The hub is a local folder."""

import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

import vampnet_jax as vampnet
from codec_bridge.errors import InputError
from vampnet_jax import cli, download

GOLDEN = Path(__file__).parent / "golden"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """A folder laid out like the hub repository, behind the two calls that the code makes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.commits = {"main": COMMIT, "v2": "2" * 40}
        self.known = set(self.commits.values())
        self.online = True
        self.fetched: list[str] = []
        self.named: dict[str, str] = {}
        root.mkdir()
        for name in ("coarse.pth", "c2f.pth", "codec.pth"):
            shutil.copy(GOLDEN / name, root / name)

    def model_info(self, repo_id: str, *, revision: str, files_metadata: bool) -> SimpleNamespace:
        assert repo_id == "hugggof/vampnet"
        assert files_metadata
        if not self.online:
            raise errors.OfflineModeIsEnabled("offline mode")
        self.known |= set(self.commits.values())
        if revision not in (*self.commits, *self.known):
            raise errors.RevisionNotFoundError("no such revision", response=SimpleNamespace(
                headers={}, request=None))  # fmt: skip
        files = [p.relative_to(self.root).as_posix() for p in self.root.rglob("*.pth")]
        siblings = [
            SimpleNamespace(rfilename=file, lfs=SimpleNamespace(sha256=self.named.get(file)))
            for file in files
        ]
        return SimpleNamespace(sha=self.commits.get(revision, revision), siblings=siblings)

    def hf_hub_download(self, repo_id: str, filename: str, *, revision: str) -> str:
        assert repo_id == "hugggof/vampnet"
        assert revision in self.known
        if not self.online:
            raise errors.LocalEntryNotFoundError("cannot reach the hub")
        self.fetched.append(filename)
        return str(self.root / filename)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.hf_hub_download)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "cache"))
    return hub


def run(*argv: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["download", *argv])
    return exit_.value.code


def test_the_official_model_is_fetched_converted_and_found_by_name(hub, capsys):
    assert run("official") == 0
    assert "CC BY-NC-SA 4.0" in capsys.readouterr().out
    model = vampnet.load("official")
    assert model.name == "official"
    assert (model.coarse_window, model.fine_window) == (575, 173)
    for text in ("CC BY-NC-SA 4.0", COMMIT, hashlib.sha256(
            (GOLDEN / "coarse.pth").read_bytes()).hexdigest()):  # fmt: skip
        assert text in model.card


def test_a_second_download_fetches_nothing_even_offline(hub, capsys):
    first = download.download("official")
    hub.fetched.clear()
    hub.online = False
    assert download.download("official") == first
    assert hub.fetched == []
    assert "already here" in capsys.readouterr().out


def test_before_the_download_the_name_says_how_to_fetch_it(hub):
    with pytest.raises(InputError, match="vampnet download official"):
        vampnet.load("official")


def test_offline_the_message_says_so_and_nothing_is_left(hub, capsys):
    hub.online = False
    assert run("official") == 2
    assert "is this machine online?" in capsys.readouterr().err
    with pytest.raises(InputError, match="not here yet"):
        vampnet.load("official")


def test_a_connection_lost_on_the_way_is_reported_and_continues_later(hub, monkeypatch):
    def fetch(repo_id, filename, *, revision):
        if filename == "c2f.pth":
            raise ConnectionResetError("reset by peer")
        return hub.hf_hub_download(repo_id, filename, revision=revision)

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "hf_hub_download", fetch)
        with pytest.raises(InputError, match=r"c2f\.pth could not be fetched"):
            download.download("official")
    assert download.download("official").is_dir()


def test_an_unknown_revision_is_named(hub):
    with pytest.raises(InputError, match="no revision v9"):
        download.download("official", revision="v9")


def test_the_revision_is_settable_recorded_and_kept(hub):
    download.download("official", revision="v2")
    assert "2" * 40 in vampnet.load("official").card
    hub.commits["main"] = "3" * 40
    directory = download.download("official")  # stays at what it is
    assert "2" * 40 in (directory / "MODEL_CARD.md").read_text()
    with pytest.raises(InputError, match="--overwrite"):
        download.download("official", revision="main")
    download.download("official", revision="main", overwrite=True)
    assert "3" * 40 in vampnet.load("official").card


def test_the_commit_of_the_first_download_serves_later_ones(hub):
    download.download("official")
    hub.commits["main"] = "3" * 40
    directory = download.download("official", overwrite=True)
    assert COMMIT in (directory / "MODEL_CARD.md").read_text()


def test_a_file_that_changed_since_the_first_download_is_refused(hub):
    download.download("official")
    before = vampnet.load("official").card
    shutil.copy(GOLDEN / "coarse_lora_finetuned.pth", hub.root / "coarse.pth")
    with pytest.raises(InputError, match=r"coarse\.pth .* the first download had"):
        download.download("official", overwrite=True)
    assert vampnet.load("official").card == before


def test_a_file_that_is_not_what_the_hub_names_is_refused(hub):
    hub.named["codec.pth"] = "f" * 64
    with pytest.raises(InputError, match=r"codec\.pth .* the hub names f{64}"):
        download.download("official")


def test_a_converted_model_that_was_altered_is_noticed(hub):
    directory = download.download("official")
    with open(directory / "coarse.safetensors", "r+b") as file:
        file.seek(-4, 2)
        file.write(b"\1\2\3\4")
    with pytest.raises(InputError, match=r"coarse\.safetensors is not what was converted"):
        download.download("official")
    assert download.download("official", overwrite=True) == directory
    assert download.download("official") == directory


def test_a_cache_folder_that_cannot_be_made_is_reported(hub, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(InputError, match="cannot be made"):
        download.download("official")


def test_a_damaged_record_is_reported(hub):
    directory = download.download("official")
    (directory.parent / "downloads.json").write_text("{")
    with pytest.raises(InputError, match=r"downloads\.json is damaged"):
        download.download("official")


def test_a_fine_tune_is_made_of_its_own_files_and_the_official_rest(hub):
    tuned = hub.root / "loras" / "machines"
    tuned.mkdir(parents=True)
    shutil.copy(GOLDEN / "coarse_lora_finetuned.pth", tuned / "coarse.pth")
    directory = download.download("official:machines")
    assert "coarse.pth" not in hub.fetched  # the fine-tune brings all of its weights
    model = vampnet.load("official:machines")
    wanted, _ = vampnet.from_torch(GOLDEN / "coarse_lora_finetuned.pth", GOLDEN / "codec.pth")
    assert (model.coarse.params["blocks"]["query"] == wanted["blocks"]["query"]).all()
    assert ":" not in directory.name  # not allowed in file names on Windows


def test_a_fine_tune_of_adapters_alone_goes_onto_the_official_weights(hub):
    tuned = hub.root / "loras" / "choir" / "coarse"
    tuned.mkdir(parents=True)
    state = torch.load(GOLDEN / "coarse_lora_finetuned.pth", weights_only=True)["state_dict"]
    torch.save({k: v for k, v in state.items() if "lora_" in k}, tuned / "lora.pth")
    download.download("official:choir")
    model = vampnet.load("official:choir")
    wanted, _ = vampnet.from_torch(
        GOLDEN / "coarse.pth", GOLDEN / "codec.pth", lora_path=tuned / "lora.pth"
    )
    assert (model.coarse.params["blocks"]["query"] == wanted["blocks"]["query"]).all()


def test_an_unknown_fine_tune_is_answered_with_those_there_are(hub):
    (hub.root / "loras" / "choir").mkdir(parents=True)
    shutil.copy(GOLDEN / "coarse.pth", hub.root / "loras" / "choir" / "coarse.pth")
    with pytest.raises(InputError, match=r"no fine-tune 'opera'.*choir"):
        download.download("official:opera")


@pytest.mark.parametrize("name", ["vampnet", "official:", "official:../x", "official:a/b", ""])
def test_impossible_names_are_refused(hub, name):
    with pytest.raises(InputError, match="official:NAME"):
        download.download(name)
