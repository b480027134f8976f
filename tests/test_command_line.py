"""The console script `vampnet`: light until it knows what to do, and Ctrl-C leaves no traceback."""

import errno
import os
import signal
import subprocess
import sys
from importlib.metadata import version

import pytest

import vampnet_jax as vampnet
from codec_bridge import InputError
from vampnet_jax import cli
from vampnet_jax.cli import download
from vampnet_jax.cli.naming import named_as_options
from vampnet_jax.cli.status import BROKEN_PIPE, INTERRUPTED, USER_ERROR, quiet_if_unwritten

SCRIPT = "from vampnet_jax.cli import main; main()"
"""What the installed script does."""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["nothing"]])
def test_what_needs_no_command_imports_none_of_the_libraries(arguments):
    code = (
        "import atexit, sys\n"
        "heavy = {'jax', 'numpy', 'flax', 'torch', 'tyro'}\n"
        "atexit.register(lambda: print(heavy & sys.modules.keys()))\n"
    )
    command = [sys.executable, "-c", code + SCRIPT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("set()\n")
    assert "Traceback" not in done.stderr


def test_the_package_runs_as_the_command():
    command = [sys.executable, "-m", "vampnet_jax", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == version("vampnet-jax")


@pytest.mark.parametrize("arguments", [["--version"], ["train", "--help"]])
def test_a_reader_that_stops_early_gets_no_traceback(arguments):
    command = [sys.executable, "-c", SCRIPT, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as writer:
        writer.stdout.close()
        assert writer.stderr.read() == b""
    assert writer.returncode == BROKEN_PIPE


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("arguments", [["--version"], ["train", "--help"]])
def test_output_to_a_full_disk_gets_one_sentence(arguments):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", SCRIPT, *arguments]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (USER_ERROR, 1)
    assert "disk is full" in done.stderr


def test_a_broken_pipe_that_is_not_the_output_is_an_error(capfd):
    with pytest.raises(BrokenPipeError), quiet_if_unwritten():
        raise BrokenPipeError


@pytest.mark.parametrize(
    ("says", "shown"),
    [
        ("batch_size is 0; set batch_size.", "--fine-batch-size is 0; set --fine-batch-size."),
        ("/a/batch_size/b has no x_batch_size.", "/a/batch_size/b has no x_batch_size."),
        ("seed is -1; set a seed.", "--fine-seed is -1; set a seed."),
        ("A seed is no seedling; mesh has none.", "A seed is no seedling; mesh has none."),
    ],
)
def test_errors_of_the_library_name_options_and_leave_other_words_alone(says, shown):
    subjects = ("seed", "mesh")
    with (
        pytest.raises(InputError) as raised,
        named_as_options(("batch_size",), subjects=subjects, prefix="fine_"),
    ):
        raise InputError(says)
    assert str(raised.value) == shown
    with pytest.raises(InputError, match=r"^seed is 1$"), named_as_options():
        raise InputError("seed is 1")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
@pytest.mark.parametrize("module", ["tyro", "jax._src", "flax"])
def test_ctrl_c_while_the_libraries_are_imported_leaves_no_traceback(module):
    command = [sys.executable, "-X", "importtime", "-c", SCRIPT, "sample", "--seconds", "9"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:  # tells what is being imported
            if module in line:
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    assert process.returncode == INTERRUPTED
    assert "Traceback" not in rest
    assert rest.endswith("interrupted\n")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), ValueError("I/O error: No space left on device")]
)
def test_a_full_disk_gets_one_sentence(error, monkeypatch, capsys):
    def main(argv):
        raise error

    monkeypatch.setattr(download, "main", main)
    with pytest.raises(SystemExit) as exit:
        cli.run("download", [])
    assert exit.value.code == USER_ERROR
    assert capsys.readouterr().err.startswith("error: The disk is full; make room")


def test_any_other_error_keeps_its_traceback(monkeypatch):
    def main(argv):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(download, "main", main)
    with pytest.raises(OSError, match="broken"):
        cli.run("download", [])


def test_the_library_has_everything_that_it_names():
    for name in vampnet.__all__:
        assert getattr(vampnet, name) is not None
        assert name in dir(vampnet)
    with pytest.raises(AttributeError, match="no attribute 'vmap'"):
        _ = vampnet.vmap
