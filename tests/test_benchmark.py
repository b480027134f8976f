"""`vampnet benchmark` measures what it says, and refuses what it cannot measure."""

import dataclasses
import json
import re

import jax
import pytest
from rich.console import Console
from small_codecs import random_codec
from small_models import random_model

import vampnet_jax as vampnet
from vampnet_jax import cli, placement
from vampnet_jax.benchmarking import ahead, flops, measuring, report, settings, workload
from vampnet_jax.benchmarking.measuring import Measurement
from vampnet_jax.benchmarking.memory import Peak
from vampnet_jax.benchmarking.settings import Setting
from vampnet_jax.training.pod_check import Chip
from vampnet_jax.training.sharding import Layout

STAGES = {"encode", "coarse", "fine", "decode", "everything", "first audio"}


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    before = jax.config.jax_enable_compilation_cache
    yield
    jax.config.update("jax_enable_compilation_cache", before)
    jax.config.update("jax_default_device", None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose windows are 0.32 s (coarse) and 0.16 s."""
    folder = tmp_path_factory.mktemp("model")
    vampnet.save(random_model(random_codec()), folder / "model")
    return folder / "model"


def run(*arguments):
    with pytest.raises(SystemExit) as exit_:
        cli.run("benchmark", [str(argument) for argument in arguments])
    return exit_.value.code


def test_a_run_and_its_comparison(folder, tmp_path, capsys, monkeypatch):
    """One command shows it all: stages, ratios, JSON, plot."""
    monkeypatch.setattr(flops, "WORK", 1e6)
    code = run(
        "--model", folder, "--seconds", 0.5, "--steps", 1, "--fine-steps", 1, "--repeats", 2,
        "--device", "cpu", "--compare", "steps=3", "-o", tmp_path / "out",
    )  # fmt: skip
    shown = capsys.readouterr().out
    assert code == 0
    assert "with steps=3" in shown
    content = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    base, more = content["measurements"]
    assert base["setting"]["steps"] == 1
    assert more["setting"]["steps"] == 3
    for one in (base, more):
        assert set(one["stages"]) == STAGES
        seconds = {name: stage["seconds"] for name, stage in one["stages"].items()}
        assert all(len(times["all"]) == 2 for times in seconds.values())
        for index in range(2):
            parts = [seconds[name]["all"][index] for name in ("encode", "coarse", "fine", "decode")]
            assert sum(parts) == pytest.approx(seconds["everything"]["all"][index], rel=1e-3)
        coarse = one["stages"]["coarse"]
        assert coarse["tokens"] == 63 * 2  # ⌈0.5 s · 125 frames/s⌉, two codebooks
        assert coarse["tokens_per_second"] == pytest.approx(126 / coarse["seconds"]["median"])
        assert 0 < coarse["utilisation"] < 1
        assert coarse["share_outside_transformer"] < 1
        assert one["peak_memory"]["bytes"] > 2**20
        assert one["programs_compiled"] > 0
        assert 0 < one["compile_seconds"] < one["first_run_seconds"] * 2
    assert more["stages"]["coarse"]["flops"] == 3 * base["stages"]["coarse"]["flops"]
    faster = content["times_as_fast"]["stages"]["coarse"]["all"]
    for ratio, a, b in zip(
        faster,
        base["stages"]["coarse"]["seconds"]["all"],
        more["stages"]["coarse"]["seconds"]["all"],
        strict=True,
    ):
        assert ratio == pytest.approx(a / b)
    assert (tmp_path / "out" / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "benchmark.json",
        "benchmark.png",
    ]


def test_a_model_is_measured_as_it_is_best_sampled(folder, tmp_path):
    """Its own steps by codebook, of which each computes the logits of one codebook only."""
    model = vampnet.load(folder)
    own = model.coarse_sampling.changed(codebook_steps=(3, 1))
    vampnet.save(dataclasses.replace(model, coarse_sampling=own), tmp_path / "model")
    work = workload.Workload(Setting(model=str(tmp_path / "model"), seconds=0.3, device="cpu"))
    config = work.configs()["coarse"]
    assert work.sampling["coarse"] == own
    head = 2 * config.embedding_dim * config.vocab_size  # of a frame and codebook
    one_pass = flops.forward_flops(config, work.n_frames)
    assert work.flops()["coarse"] == 4 * (one_pass - work.n_frames * head)
    measurement = measuring.measure([work.setting], 1)[0]
    sampling = measurement.as_json()["stages"]["coarse"]["sampling"]
    assert sampling["codebook_steps"] == (3, 1)
    console = Console(width=200)
    with console.capture() as shown:
        report.show(measurement, console)
    assert "coarse: 3+1 steps" in shown.get()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--batch", "0"], "--batch is 0"),
        (["--seconds", "0.01"], "--seconds is 0.01"),
        (["--seconds", "nan"], "--seconds is nan"),
        (["--steps", "4", "0"], "--steps is 0"),
        (["--fine-steps", "0"], "--fine-steps is 0"),
        (["--top-k", "0"], "--top-k is 0"),
        (["--repeats", "0"], "--repeats is 0"),
        (["--overwrite"], "--overwrite"),
        (["--model", "nowhere"], "nowhere"),
        (["--model", "tiny", "--config", "coarse"], "leave out --model"),
        (["--config", "coarse", "--fine-steps", "3"], "--fine-steps has no effect"),
        (["--config", "fine", "--steps", "3"], "--steps has no effect"),
        (["--attention", "cudnn", "--dtype", "bfloat16"], "cuDNN attention needs"),
        (["--attention", "cudnn"], "16 bits"),
        (["--device", "tpu"], "finds no TPU"),
        (["--mesh", "data=3"], "needs 3 devices"),
        (["--mesh", "rows=2"], "rows=2"),
        (["--compare", "dtype"], "OPTION=VALUE"),
        (["--compare", "colour=red"], "colour=red"),
        (["--steps", "24", "--compare", "steps=24"], "changes nothing"),
        (["--compare", "batch=0"], "--batch is 0"),
        (["--compare", "batch=2", "--steps", "1", "2"], "give one value"),
        (["--compare", "batch=2", "--topology", "v5e:2x2"], "leave one out"),
        (["--topology", "v5e:2x2", "--repeats", "2"], "--repeats has no effect"),
        (["--topology", "v5e:2x2", "--device", "cpu"], "--device has no effect"),
        (["--topology", "moon:2x2"], "moon:2x2"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_sentence(arguments, says, tmp_path, capsys):
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_replaced_unasked(folder, tmp_path, capsys):
    (tmp_path / "benchmark.json").write_text("{}")
    assert run("--model", folder, "-o", tmp_path) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "benchmark.json").read_text() == "{}"


def test_further_values_are_measured_with_the_first_of_the_others():
    from vampnet_jax.cli.benchmark import _parse, _points

    arguments = ["--batch", "1", "4", "--steps", "8", "12", "16", "--typical-mass", "off"]
    points = [(s.batch, s.steps, s.fine_steps) for s in _points(_parse(arguments))]
    assert points == [(1, 8, None), (4, 8, None), (1, 12, None), (1, 16, None)]
    assert all(s.typical_mass == "off" for s in _points(_parse(arguments)))


def test_options_reach_the_models():
    setting = Setting(dtype="bfloat16", typical_mass="off", top_k=5, steps=3)
    config = vampnet.ModelConfig(n_codebooks=2)
    assert setting.computing(config).dtype == "bfloat16"
    default = vampnet.SamplingOptions(top_p=0.9)
    expected = vampnet.SamplingOptions(steps=3, typical_mass=None, top_k=5, top_p=0.9)
    assert setting.sampling("coarse", default) == expected
    own = vampnet.SamplingOptions(codebook_steps=(4, 2))
    assert setting.sampling("fine", own) == dataclasses.replace(own, typical_mass=None, top_k=5)
    assert setting.sampling("coarse", own).codebook_steps is None


@pytest.fixture
def small_official(monkeypatch):
    """Small stand-ins for the published sizes, which take gigabytes."""
    for name, published in settings.OFFICIAL.items():
        sizes = {"n_layers": 1, "n_heads": 2, "embedding_dim": 16, "vocab_size": 32}
        small = dataclasses.replace(published.config, **sizes)
        monkeypatch.setitem(settings.OFFICIAL, name, published._replace(config=small))


def test_the_published_sizes_are_measured_with_random_weights(small_official):
    assert settings.frames(10.0) == 575
    assert settings.frames(3.0) == 173
    work = workload.Workload(Setting(config="fine", seconds=7.0, fine_steps=2, batch=2))
    assert set(work.run(0)) == {"fine"}
    assert work.tokens() == {"fine": 2 * 402 * 10}
    assert work._starts("fine") == [0, 130, 229]
    one_pass = flops.forward_flops(work.configs()["fine"], 173)
    assert work.flops() == {"fine": 2 * 3 * 2 * one_pass}


def test_sampling_is_compiled_for_chips_that_are_not_here(small_official, monkeypatch, capsys):
    """(The test's chips are simulated CPU devices, so that no TPU compiler is needed.)"""
    chip = Chip(flops=1e12, memory=2**30, link_rate=1e9, memory_rate=1e6)
    monkeypatch.setattr(ahead, "devices_of", lambda topology: (jax.devices(), chip))
    console = Console(width=200)
    setting = Setting(config="coarse", batch=4, steps=3, seconds=1.0, mesh="data=1,tensor=2")
    assert ahead.check(setting, "v5e:1x2", console)
    shown = capsys.readouterr().out
    assert "4 windows of 72 frames, 3 steps" in shown  # 58 frames, in the next eighth of 575
    assert "least time (roofline)" in shown
    assert re.search(r"all-reduce +\d+ ×, [\d.]+ MB sent", shown)
    (work,) = ahead.works(setting)
    layout = Layout(placement.mesh_of("data=2", work.config))
    found = ahead.estimate(ahead.compile_work(work, layout), work, layout, chip)
    n_parameters = sum(x.size for x in jax.tree.leaves(ahead.abstract_params(work.config)))
    assert found.needs.arguments >= 4 * n_parameters
    assert found.flops == 2 * 3 * flops.forward_flops(work.config, 72)
    logits = 4 * 2 * 72 * 4 * work.config.vocab_size
    assert found.traffic == 3 * (4 * n_parameters + 2 * logits)
    assert found.times["memory"] == found.traffic / 1e6
    by_codebook = vampnet.SamplingOptions(codebook_steps=(2, 1, 1, 1), guidance=0.5)
    work = dataclasses.replace(work, options=by_codebook)
    found = ahead.estimate(ahead.compile_work(work, layout), work, layout, chip)
    head = 4 * (work.config.embedding_dim + 1) * work.config.vocab_size  # of one codebook
    passes_and_heads = 6 * (4 * n_parameters - 4 * head) + 10 * head
    assert found.traffic == passes_and_heads + 10 * 2 * logits / 4
    with pytest.raises(vampnet.InputError, match="multiple of 2"):
        ahead.check(Setting(config="coarse", batch=3), "v5e:1x2", console)


def test_flops_are_those_that_the_compiler_counts():
    config = vampnet.ModelConfig(n_codebooks=3, n_layers=1, n_heads=4, embedding_dim=128)
    codebooks = jax.ShapeDtypeStruct((3, 1024, 8), "float32")
    params = jax.eval_shape(lambda c: vampnet.init(jax.random.key(0), config, c), codebooks)
    tokens = jax.ShapeDtypeStruct((1, 3, 200), "int32")
    compiled = vampnet.apply.lower(params, tokens, config).compile()
    counted = compiled.cost_analysis()["flops"]
    assert flops.forward_flops(config, 200) == pytest.approx(counted, rel=0.06)  # norms, softmax


def test_flops_of_sampling_are_those_of_its_passes_and_logits():
    config = vampnet.ModelConfig(n_codebooks=3, n_layers=1, n_heads=4, embedding_dim=128)
    whole, body = flops.forward_flops(config, 200), flops.forward_flops(config, 200, 0)
    head = 200 * 2 * 128 * config.vocab_size  # of one codebook
    assert whole == body + 3 * head

    def of(**options):
        return flops.sampling_flops(config, vampnet.SamplingOptions(**options), 200)

    assert of(steps=5) == 5 * whole
    assert of(codebook_steps=(3, 1, 1)) == 5 * (body + head)
    assert of(steps=5, guidance=1.0) == 6 * body + 10 * 3 * head
    assert of(codebook_steps=(3, 1, 1), guidance=1.0) == 6 * body + 10 * head


def test_settings_are_told_apart_by_their_names():
    changes = (
        {}, {"steps": 3}, {"fine_steps": 3}, {"top_p": "off"}, {"top_k": 3}, {"guidance": 0.5},
        {"order": "spread"}, {"typical_mass": 0.2}, {"mesh": "data=2"}, {"device": "cpu"},
        {"dtype": "bfloat16"}, {"attention": "xla"}, {"batch": 2}, {"seconds": 3.0},
    )  # fmt: skip
    assert len({Setting(**change).describe() for change in changes}) == len(changes)


def test_what_ends_by_entropy_has_no_rates(folder, tmp_path):
    model = vampnet.load(folder)
    own = model.coarse_sampling.changed(steps=3, entropy_bound=5.0, typical_mass=None)
    vampnet.save(dataclasses.replace(model, coarse_sampling=own), tmp_path / "model")
    setting = Setting(model=str(tmp_path / "model"), seconds=0.3, device="cpu")
    stages = measuring.measure([setting], 1)[0].as_json()["stages"]
    assert "flops" not in stages["coarse"]
    assert "flops" in stages["fine"]


def made_up(seconds, forward, rate, **setting) -> Measurement:
    by_codebook = vampnet.SamplingOptions(codebook_steps=(24, 8))
    return Measurement(
        setting=Setting(**setting), audio_seconds=10.0, tokens={"coarse": 1000},
        flops={"coarse": 10**9}, platform="cpu", n_devices=1, dtypes={"coarse": "float32"},
        codec_device="cpu", seconds={"coarse": seconds}, forward={"coarse": forward},
        matmul={"coarse": rate}, memory=Peak(2**30, "the process"),
        sampling={"coarse": Setting(**setting).sampling("coarse", by_codebook)},
    )  # fmt: skip


def test_figures_follow_from_the_times():
    m = made_up([1.0, 2.0, 4.0], [0.5, 1.5, 3.0], [4e9, 1e9, 1e9], batch=2)
    assert m.median("coarse") == 2.0
    assert m.times_real_time("coarse") == 10.0
    assert m.utilisation("coarse") == 0.25  # of 0.25, 0.5 and 0.25, each by its own round's rate
    assert m.outside("coarse") == 0.25
    assert m.forward_utilisation("coarse") == 0.5
    other = made_up([0.5, 0.5, 1.0], [0.1] * 3, [1e9] * 3, batch=4)
    assert report.ratios(m, other)["coarse"] == [4.0, 8.0, 8.0]


def test_the_plot_has_a_panel_for_each_option_that_varies(tmp_path, monkeypatch):
    one = made_up([1.0], [0.5], [1e9])
    more = [made_up([1.0], [0.5], [1e9], **changed) for changed in ({"batch": 8}, {"batch": 2})]
    slow = made_up([2.0], [0.5], [1e9], steps=48)
    batches = report._line([one, *more, slow], "batch")
    assert [m.setting.batch for m in batches] == [1, 2, 8]
    by_steps = report._line([one, *more, slow], "steps")
    assert [report._value(m, "steps") for m in by_steps] == [32, 48]
    drawn = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda figure, path, **_: drawn.extend(figure.axes)
    )
    report.draw(tmp_path / "plot.png", [one, *more, slow])
    assert [axes.get_xlabel() for axes in drawn] == ["batch", "coarse steps"]
    assert [tick.get_text() for tick in drawn[0].get_xticklabels()] == ["1", "2", "8"]
    assert list(drawn[1].lines[0].get_ydata()) == [10.0, 5.0]  # 10 s of audio in 1 and 2 s


def test_compilations_are_counted():
    with measuring.counted_compilations() as found:
        jax.jit(lambda x: x * 3 + 1)(jax.numpy.ones(7)).block_until_ready()
    assert len(found) >= 2
    assert all(seconds >= 0 for _, seconds in found)
    n = len(found)
    jax.jit(lambda x: x * 5 + 1)(jax.numpy.ones(7)).block_until_ready()
    assert len(found) == n
