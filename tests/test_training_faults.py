"""What may go wrong in a run and must not cost it: stops, damage, spikes, full disks, lost data."""

import asyncio
import dataclasses
import errno
import gc
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from small_runs import logged, small
from small_tokens import write_folder

from codec_bridge import InputError
from codec_bridge.errors import no_space
from vampnet_jax.cli.status import INTERRUPTED, TRY_AGAIN
from vampnet_jax.cli.train import TrainOptions
from vampnet_jax.cli.train import main as train
from vampnet_jax.config import ModelConfig
from vampnet_jax.training import checkpoints, frequencies, loop
from vampnet_jax.training.checkpoints import Checkpoints, load_run, read_run
from vampnet_jax.training.config import TrainConfig
from vampnet_jax.training.log import RunLog
from vampnet_jax.training.spikes import JUDGED_FROM, MEMORY, judge
from vampnet_jax.training.step import init_state, train_step

SMALL = small("--warmup-steps=2", "--log-every=1")


@pytest.fixture(scope="module", autouse=True)
def _compile_once(tmp_path_factory):
    """Runs of the same model share their compiled programs."""
    before = jax.config.jax_compilation_cache_dir
    folder = str(tmp_path_factory.mktemp("compiled"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", folder)
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()
        yield
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tokens"
    write_folder(folder, [60, 60, 200, 900])
    return folder


@pytest.fixture(scope="module")
def whole_run(tokens, tmp_path_factory) -> Path:
    """Six steps, a checkpoint after every second."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    options = ["--steps=6", "--save-every=2", "--keep=5"]
    assert train([str(tokens), "--out", str(run), *options, *SMALL]) == 0
    return run


def same_end(run: Path, other: Path) -> bool:
    ends = [load_run(folder, step=6)[0] for folder in (run, other)]
    return jax.tree.all(jax.tree.map(np.array_equal, *ends)) and logged(run) == logged(other)


def truncate(checkpoint: Path) -> None:
    """Cut every file of the state in half, as a crash of the machine may leave them."""
    files = [path for path in (checkpoint / "state").rglob("*") if path.is_file()]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# --- stopping and continuing


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, TRY_AGAIN), (signal.SIGINT, INTERRUPTED)]
)
def test_a_signal_saves_and_the_same_command_continues_exactly(
    whole_run, tokens, tmp_path, monkeypatch, number, status
):
    run = tmp_path / "run"
    command = [str(tokens), "--out", str(run), "--steps=6", "--save-every=2", "--keep=5", *SMALL]
    show = RunLog.show

    def show_and_send(self, step, metrics, done):
        show(self, step, metrics, done)
        if step == 3:
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "show", show_and_send)
        assert train(command) == status
    assert 4 in Checkpoints(run, keep=5, read_only=True).steps
    assert train(command) == 0
    assert same_end(run, whole_run)
    assert train(command) == 0  # and once more there is nothing left to do


def test_continuing_with_other_settings_is_refused_in_one_sentence(whole_run, tokens, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    command = [str(tokens), "--out", str(run)]
    with pytest.raises(InputError, match=r"--batch-size 4 and cannot be continued with 8"):
        train([*command, "--batch-size=8"])
    with pytest.raises(InputError, match=r"--preset tiny and cannot be continued with coarse"):
        train([*command, "--preset=coarse"])
    with pytest.raises(InputError, match=r"already holds a run; leave --new out"):
        train([*command, "--new"])
    assert read_run(run) == read_run(whole_run)


def test_a_run_can_begin_with_the_weights_of_another(whole_run, tokens, tmp_path, monkeypatch):
    run = tmp_path / "run"
    sizes = [option for option in SMALL if not option.startswith(("--n-", "--embedding"))]
    command = [str(tokens), "--out", str(run), "--init-from", str(whole_run), *sizes]
    starts = []
    with_weights = loop.with_weights

    def with_weights_noted(state, params):
        begun = with_weights(state, params)
        starts.append(jax.tree.map(np.array, begun))  # its buffers are donated
        return begun

    monkeypatch.setattr(loop, "with_weights", with_weights_noted)
    run.mkdir()
    (run / ".config.1a2b3c4d.json").touch()  # of a start that was killed
    assert train([*command, "--steps=1"]) == 0
    weights, config = load_run(whole_run)
    np.testing.assert_array_equal(starts[0].params["norm"], weights["norm"])
    np.testing.assert_array_equal(starts[0].ema["head"]["kernel"], weights["head"]["kernel"])
    assert starts[0].step == 0
    assert read_run(run)[0].model == config
    assert train([*command, "--steps=2"]) == 0  # its own checkpoint comes first
    assert len(starts) == 1
    with pytest.raises(InputError, match=r"not begun with the weights of tiny; leave --init-from"):
        train([*command[:3], "--init-from=tiny", "--steps=3"])
    with pytest.raises(InputError, match=r"has --n-layers 1, which cannot become 3"):
        train([*command[:2], str(tmp_path / "other"), *command[3:], "--steps=1", "--n-layers=3"])
    assert not (tmp_path / "other").exists()


def test_ctrl_c_while_modules_load_ends_at_once_without_a_traceback():
    code = (
        "import os, signal\n"
        "from vampnet_jax.cli.status import loading\n"
        "with loading():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    import time; time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == INTERRUPTED
    assert done.stderr.strip() == "interrupted"


def test_ctrl_c_during_the_first_imports_leaves_no_traceback():
    script = Path(__file__).parent.parent / "train.py"
    command = [sys.executable, "-X", "importtime", str(script)]  # tells what is being imported
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "codec_bridge.errors" in line:  # the first of ours; JAX comes next
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    assert process.returncode in (INTERRUPTED, -signal.SIGINT)
    assert "Traceback" not in rest
    assert "orbax" not in rest


# --- checkpoints


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_with_a_warning(
    whole_run, tokens, tmp_path, capsys
):
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    truncate(run / "checkpoints" / "6")
    capsys.readouterr()
    assert train(["--out", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "warning: checkpoint 6 is damaged" in shown
    assert "from step 4" in shown
    assert (run / "damaged" / "6").is_dir()
    assert same_end(run, whole_run)


def test_whatever_the_reading_of_a_checkpoint_raises_the_one_before_is_used(
    whole_run, tmp_path, capsys, monkeypatch
):
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    read = checkpoints._read
    errors = {6: AssertionError(), 4: ValueError("[/state] has no [end]")}

    def read_or_raise(reader, step, wanted):
        if step in errors:
            raise errors[step]
        return read(reader, step, wanted)

    monkeypatch.setattr(checkpoints, "_read", read_or_raise)
    assert train(["--out", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "checkpoint 6 is damaged (AssertionError: AssertionError)" in shown
    assert "checkpoint 4 is damaged (ValueError: [/state] has no [end])" in shown
    assert "from step 2" in shown
    assert same_end(run, whole_run)


def test_what_a_failed_read_left_unfinished_prints_nothing(whole_run, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    read = checkpoints._read

    async def read_array() -> None:
        try:
            await asyncio.Future()
        except BaseException as error:  # as Orbax does, when the coroutine is collected
            raise RuntimeError("a page of text") from error

    def leave_unfinished(reader, step, wanted):
        if step < 6:
            return read(reader, step, wanted)
        loop = asyncio.new_event_loop()
        unfinished = loop.create_task(read_array())
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
        raise ValueError(f"damaged, and {unfinished} was not waited for")

    printed = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    monkeypatch.setattr(checkpoints, "_read", leave_unfinished)
    assert train(["--out", str(run)]) == 0
    gc.collect()
    assert not printed


def test_if_every_checkpoint_is_damaged_nothing_is_changed_and_the_run_does_not_begin_again(
    whole_run, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    for step in (2, 4, 6):
        truncate(run / "checkpoints" / str(step))
    with pytest.raises(InputError, match=r"No checkpoint in .* can be read \(step 6: "):
        train(["--out", str(run)])
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["2", "4", "6"]
    with (
        pytest.raises(InputError, match="No checkpoint of"),
        pytest.warns(UserWarning, match="cannot be read"),
    ):
        load_run(run)


def test_milestones_are_kept_besides_the_newest(tokens, tmp_path):
    run = tmp_path / "run"
    options = ["--steps=7", "--save-every=1", "--milestone-every=3", "--keep=1"]
    assert train([str(tokens), "--out", str(run), *options, *SMALL]) == 0
    best = Checkpoints(run, keep=1, read_only=True).by_loss()[0]
    assert set(Checkpoints(run, keep=1, read_only=True).steps) == {3, 6, 7, best}


def test_reading_a_run_under_way_leaves_its_unfinished_checkpoint_alone(whole_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    unfinished = run / "checkpoints" / "8.orbax-checkpoint-tmp"
    shutil.copytree(run / "checkpoints" / "6", unfinished)
    load_run(run)
    assert unfinished.is_dir()


def test_a_state_is_restored_onto_any_mesh(whole_run):
    config, _ = read_run(whole_run)
    checkpoints = Checkpoints(whole_run, keep=5, read_only=True)
    one = checkpoints.restore(config)
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))

    def sharding(x: jax.Array) -> jax.sharding.NamedSharding:
        divided = x.ndim > 1 and x.shape[-1] % 2 == 0
        spec = [*[None] * (x.ndim - 1), "fsdp"] if divided else []
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    assert one is not None
    two = checkpoints.restore(config, jax.tree.map(sharding, one.state))
    assert two is not None
    assert len(two.state.params["head"]["kernel"].sharding.device_set) == 2
    jax.tree.map(np.testing.assert_array_equal, one.state, two.state)


# --- losses


def test_metrics_are_read_one_step_behind_and_all_before_a_save_and_compiling_takes_no_time(
    tokens, tmp_path, monkeypatch
):
    order = []
    init, check, save = loop._Loop.__init__, loop._Loop.check_finite, Checkpoints.save
    restart = loop.Meter.restart  # at first, after the first step was compiled, after each report
    monkeypatch.setattr(loop.Meter, "restart", lambda *a: (order.append("time"), restart(*a))[1])

    def init_and_listen(self, *args):
        init(self, *args)
        take = self.take_step
        self.take_step = lambda *a: (order.append(f"start {self.step + 1}"), take(*a))[1]

    monkeypatch.setattr(loop._Loop, "__init__", init_and_listen)
    monkeypatch.setattr(
        loop._Loop, "check_finite", lambda *a: (order.append(f"read {a[1]}"), check(*a))[1]
    )
    monkeypatch.setattr(Checkpoints, "save", lambda *a: (order.append(f"save {a[1]}"), save(*a))[1])
    options = ["--steps=4", "--save-every=3"]
    assert train([str(tokens), "--out", str(tmp_path / "run"), *options, *SMALL]) == 0
    assert order == [
        *("time", "start 1", "time", "start 2", "read 1", "time", "start 3", "read 2", "time"),
        *("read 3", "time", "save 3", "start 4", "read 4", "time", "save 4"),
    ]


def test_a_state_whose_loss_is_not_finite_is_never_saved(tokens, tmp_path):
    run = tmp_path / "run"
    options = ["--steps=50", "--save-every=1", "--learning-rate=1e15", "--schedule=constant"]
    with pytest.raises(InputError, match=r"not a finite number at step (\d+)"):
        train([str(tokens), "--out", str(run), *options, *SMALL])
    config, _ = read_run(run)
    restored = Checkpoints(run, keep=2, read_only=True).restore(config)
    assert restored is not None
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(restored.state))


def test_a_norm_far_above_the_usual_one_is_a_spike_until_it_is_usual():
    usual = jnp.float32(0)
    for step in range(100):
        good, usual = judge(jnp.float32(1 + step % 2), usual, jnp.int32(step), 4.0)
        assert good
    assert float(usual) == pytest.approx(1.5, abs=0.1)
    for bad in (math.inf, math.nan):
        good, after = judge(jnp.float32(bad), usual, jnp.int32(100), 4.0)
        assert not good
        assert after == usual
    verdicts = []
    for step in range(100, 100 + 2 * MEMORY):
        good, usual = judge(jnp.float32(30), usual, jnp.int32(step), 4.0)
        verdicts.append(bool(good))
    assert not verdicts[0]
    assert verdicts[-1]
    assert judge(jnp.float32(30), jnp.float32(1), jnp.int32(JUDGED_FROM - 1), 4.0)[0]


def test_a_skipped_step_changes_nothing_but_the_step_number():
    model = ModelConfig(n_codebooks=2, n_layers=1, n_heads=2, embedding_dim=16, vocab_size=16)
    config = TrainConfig(model, steps=9, batch_size=2, skip_spikes=2.0, ema_decay=0.9)
    codebooks = jax.random.normal(jax.random.key(0), (2, 16, 8))
    tokens = np.random.default_rng(0).integers(0, 16, (2, 2, 12)).astype(np.int32)
    step = jax.jit(train_step, static_argnames="config")
    state = init_state(config, codebooks)._replace(step=jnp.int32(JUDGED_FROM))
    calm = state._replace(spikes={"usual_norm": jnp.float32(1e-9)})
    after, metrics = step(calm, tokens, np.float32(0), config=config)
    assert metrics["skipped"] == 1
    assert after.step == JUDGED_FROM + 1
    for name in ("params", "ema", "moments"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(calm, name))
    wild = state._replace(spikes={"usual_norm": jnp.float32(1e9)})
    after, metrics = step(wild, tokens, np.float32(0), config=config)
    plain = dataclasses.replace(config, skip_spikes=0.0)
    without, _ = step(state._replace(spikes={}), tokens, np.float32(0), config=plain)
    assert metrics["skipped"] == 0
    assert jnp.any(after.params["norm"] != wild.params["norm"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        (after.params, after.ema),
        (without.params, without.ema),
    )


def test_a_run_whose_every_step_is_a_spike_ends_in_one_sentence(tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SKIPS_IN_A_ROW", 3)
    options = ["--steps=50", "--skip-spikes=3", "--learning-rate=1e15", "--schedule=constant"]
    with pytest.raises(InputError, match=r"The last 3 steps up to \d+ were all skipped"):
        train([str(tokens), "--out", str(tmp_path / "run"), *options, *SMALL])


# --- disks and data


def test_a_full_disk_ends_with_one_sentence_and_leaves_the_checkpoint_before(
    whole_run, tokens, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    shutil.rmtree(run / "checkpoints" / "6")

    def full(self, step, *args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", full)
        with pytest.raises(
            InputError, match=r"The disk of .* is full \(\d+ MiB free .*: make room"
        ):
            train(["--out", str(run)])
    assert train(["--out", str(run)]) == 0
    assert same_end(run, whole_run)


def test_a_write_that_really_fails_in_the_background_ends_with_one_sentence(whole_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    shutil.rmtree(run / "checkpoints" / "6")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))  # of any one file
    try:
        with pytest.raises(InputError, match=r"cannot be written to .*same command again"):
            train(["--out", str(run)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert train(["--out", str(run)]) == 0
    assert same_end(run, whole_run)


def test_libraries_say_in_many_ways_that_a_disk_is_full():
    inner = OSError(errno.EDQUOT, "quota")
    outer = RuntimeError("writing failed")
    outer.__cause__ = inner
    assert no_space(outer)
    assert no_space(ValueError("Error writing: [OS error 28: ENOSPC No space left on device]"))
    assert not no_space(OSError(errno.EACCES, "denied"))


def test_a_dataset_that_vanishes_ends_with_one_sentence_and_the_run_continues_when_it_is_back(
    whole_run, tokens, tmp_path, monkeypatch
):
    data, run, away = tmp_path / "tokens", tmp_path / "run", tmp_path / "away"
    shutil.copytree(tokens, data)
    shutil.copytree(whole_run, run)
    shutil.rmtree(run / "checkpoints" / "6")
    next_batch = loop._Loop.next_batch

    def vanish(self, batches):
        if self.step == 5:
            data.rename(away)

            class Lost:
                def __next__(self):
                    raise FileNotFoundError(errno.ENOENT, "No such file or directory")

            return next_batch(self, Lost())
        return next_batch(self, batches)

    command = [str(data), "--out", str(run)]
    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "next_batch", vanish)
        with pytest.raises(InputError, match=r"tokens is gone; bring the tokens back"):
            train(command)
    assert Checkpoints(run, keep=5, read_only=True).steps[-1] == 5
    with pytest.raises(InputError, match="no token folder"):
        train(command)
    away.rename(data)
    assert train(command) == 0
    assert same_end(run, whole_run)


def test_token_frequencies_are_counted_once_and_again_only_for_other_tracks(
    whole_run, tokens, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    counted = []
    count = frequencies.token_frequencies
    monkeypatch.setattr(
        frequencies, "token_frequencies", lambda *a: (counted.append(1), count(*a))[1]
    )
    assert train([str(tokens), "--out", str(run), "--steps=7"]) == 0
    assert not counted
    other = tmp_path / "tokens"
    write_folder(other, [60, 60, 300])
    capsys.readouterr()
    assert train([str(other), "--out", str(run), "--steps=8"]) == 0
    assert len(counted) == 1
    assert "the training tracks are not those" in capsys.readouterr().out


# --- options


def test_every_setting_is_an_option_of_the_command_line():
    settings = {
        field.name for kind in (TrainConfig, ModelConfig) for field in dataclasses.fields(kind)
    }
    decided_elsewhere = {"model", "lora", "source_weights", "vocab_size", "latent_dim"}
    assert settings - decided_elsewhere <= {
        field.name for field in dataclasses.fields(TrainOptions)
    }
