"""Compiling the step for a pod that is not here: what is read from the compiled program."""

import dataclasses
import importlib.util
import math

import jax
import pytest
from rich.console import Console

import vampnet_jax as vampnet
from codec_bridge import InputError
from vampnet_jax.cli.status import FAILED_CHECK, OK
from vampnet_jax.cli.train import main as train
from vampnet_jax.lora import LoraConfig
from vampnet_jax.release import read_description, resolve
from vampnet_jax.training import begin, pod_check
from vampnet_jax.training.checkpoints import write_run
from vampnet_jax.training.collectives import Collective, collectives
from vampnet_jax.training.config import TrainConfig
from vampnet_jax.training.sharding import plan
from vampnet_jax.training.step import jitted_step

CONFIG = TrainConfig(
    model=vampnet.ModelConfig(
        n_codebooks=3, n_layers=2, n_heads=2, embedding_dim=16, vocab_size=32
    ),
    batch_size=4,
    steps=1,
)
SMALL = ["--n-layers=1", "--n-heads=2", "--embedding-dim=16", "--batch-size=4"]

HLO = """
HloModule step, entry_computation_layout={()->f32[]}, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (state: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %ag = bf16[64,16]{1,0:T(8,128)(2,1)} all-gather(%w), replica_groups=[1,8]<=[8], dimensions={0}
  %rs = f32[8,16]{1,0} reduce-scatter(%g), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}

%condition (state: (s32[], f32[8,16])) -> pred[] {
  %n = s32[]{:T(128)} constant(20)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%other (state: (s32[])) -> (s32[]) {
  %first = f32[10]{0} all-gather(%v), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
  %last = f32[10]{0} all-gather(%v), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
}

ENTRY %main (p: f32[8,16]) -> f32[] {
  %loop = (s32[], f32[8,16]) while(%init), condition=%condition, body=%body
  %again = (s32[]) while(%done), condition=%unknown, body=%other, backend_config={"known_trip_count":{"n":"3"}}
  %start = (f32[4]{0}, f32[32]{0}) all-gather-start(%x), replica_groups=[1,8]<=[8], dimensions={0}
  %done = f32[32]{0} all-gather-done(%start)
  %named = s8[40]{0} all-to-all(%z), replica_groups=mesh['a'=2,'b'=4] {'a','b':(1)2}, dimensions={0}
  ROOT %loss = f32[100]{0} all-reduce(%y), replica_groups={}, to_apply=%add
}
"""  # noqa: E501


def test_collectives_are_counted_with_their_loops_and_sizes():
    gathered = 20 * 64 * 16 * 2 + 3 * 10 * 4 + 32 * 4  # what is in pieces counts once
    scattered = 20 * 4 * 8 * 16 * 4  # the result is a quarter of what is reduced
    assert collectives(HLO) == [
        Collective("all-gather", 24, gathered, gathered * 7 / 8),
        Collective("all-reduce", 1, 400, 2 * 400 * 7 / 8),
        Collective("reduce-scatter", 20, scattered, scattered * 3 / 4),
        Collective("all-to-all", 1, 40, 40 * 3 / 4),
    ]


@pytest.fixture(scope="module")
def compiled():
    layout = plan(CONFIG.model, CONFIG.batch_size, "fsdp=2", devices=jax.devices())
    return pod_check.compile_step(CONFIG, layout, 20)


def test_a_compiled_step_is_measured_per_chip(compiled):
    report = pod_check.measure(compiled, CONFIG, 20, pod_check.CHIPS["v5e"])
    state = jax.tree.leaves(pod_check.abstract_state(CONFIG))
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in state)
    assert size / 2 < report.needs.arguments < 0.8 * size  # codebooks are whole on both
    assert report.needs.temporaries > 0
    assert report.needs.outputs < 0.1 * report.needs.arguments  # the new state replaces the old one
    assert {item.kind for item in report.needs.collectives} >= {"all-gather"}
    assert all(0 < item.sent <= 2 * item.bytes for item in report.needs.collectives)


def test_a_lora_step_holds_the_frozen_weights_in_shares_and_moments_of_the_adapters_only(compiled):
    whole = pod_check.measure(compiled, CONFIG, 20, pod_check.CHIPS["v5e"])
    config = dataclasses.replace(CONFIG, lora=LoraConfig(rank=2))
    layout = plan(config.model, config.batch_size, "fsdp=2", devices=jax.devices())
    adapting = pod_check.compile_step(config, layout, 20)
    report = pod_check.measure(adapting, config, 20, pod_check.CHIPS["v5e"])
    state = layout.abstract(pod_check.abstract_state(config))
    kept = {name: in_bytes(x) for name, x in state._asdict().items()}
    tokens = 4 * CONFIG.batch_size * CONFIG.model.n_codebooks * 20 // 2
    assert report.needs.arguments == pytest.approx(
        sum(n for n, _ in kept.values()) + tokens, rel=0.01
    )
    here, in_all = kept["frozen"]
    assert here <= 0.55 * in_all  # the mask's vectors are whole on both
    assert kept["moments"][0] <= 2.1 * kept["params"][0]
    assert report.needs.arguments < 0.5 * whole.needs.arguments
    assert report.model_flops < whole.model_flops  # no gradient of the frozen weights


def in_bytes(tree) -> tuple[int, int]:
    """Bytes of arrays on one device, and in all."""
    leaves = jax.tree.leaves(tree)
    here = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
    return here, sum(x.size * x.dtype.itemsize for x in leaves)


def lora_sizes(**asked):
    config, n_frames = begin.sizes(begin.Request(lora={"rank": 4}, **asked))
    assert config.lora is not None
    assert config.lora.rank == 4
    return config, n_frames


def test_lora_is_compiled_with_its_recipe_for_a_model_a_run_or_the_published_sizes(tmp_path):
    config, n_frames = lora_sizes(stage="fine")
    assert (config.model.embedding_dim, config.model.n_layers, n_frames) == (1280, 16, 173)
    assert (config.batch_size, config.warmup_steps) == (8, 500)
    config, n_frames = lora_sizes(lora_from="tiny")
    tiny = read_description(resolve("tiny"))
    assert config.model.embedding_dim == tiny["coarse"]["config"]["embedding_dim"]
    assert n_frames == tiny["coarse"]["window"]
    write_run(tmp_path, CONFIG, {"stage": "coarse", "codec": tiny["codec"]})
    (tmp_path / "checkpoints").mkdir()
    config, n_frames = lora_sizes(lora_from=str(tmp_path))
    assert (config.model.n_codebooks, n_frames) == (3, 250)  # 10 s of 25 frames/s
    with pytest.raises(InputError, match="leave --preset out"):
        lora_sizes(lora_from="tiny", preset="coarse")


def test_the_roofline_lies_between_full_overlap_and_none():
    chip = pod_check.Chip(flops=100.0, memory=10.0, link_rate=1.0, memory_rate=1.0)
    needs = pod_check.Needs(
        chip=chip,
        arguments=3.0,
        temporaries=4.0,
        outputs=1.0,
        collectives=(Collective("all-gather", 1, 2.0, 3.0),),
    )
    report = pod_check.Report(needs, model_flops=150.0, flops=200.0)
    assert report.needs.memory == 8.0
    assert report.times == {"compute": 2.0, "links": 3.0}
    assert report.seconds == (3.0, 5.0)
    assert report.mfu(3.0) == pytest.approx(0.5)


@pytest.mark.parametrize(("preset", "n_frames", "given"), [("coarse", 575, 0), ("fine", 173, 4)])
def test_without_tokens_the_sizes_are_those_of_the_published_codec(preset, n_frames, given):
    settings = {"batch_size": 256, "steps": None}
    config, frames = begin.sizes(begin.Request(preset=preset, settings=settings))
    assert frames == n_frames
    assert config.model.n_conditioning_codebooks == given
    assert (config.model.vocab_size, config.batch_size) == (1024, 256)


@pytest.mark.parametrize(("memory", "status", "word"), [(1e9, OK, "fits"), (1e4, 1, "not fit")])
def test_the_command_says_whether_it_fits(monkeypatch, capsys, memory, status, word):
    chip = pod_check.CHIPS["v5e"]._replace(memory=memory)
    monkeypatch.setattr(pod_check, "devices_of", lambda _: (jax.devices(), chip))
    assert train(["--compile-only", "--window-seconds=0.3", "--mesh=fsdp=2", *SMALL]) == status
    said = capsys.readouterr().out
    assert word in said.splitlines()[-1]
    assert "roofline step time" in said
    assert FAILED_CHECK == 1


def test_the_command_compiles_the_lora_step_where_adapters_are_asked_for(monkeypatch, capsys):
    chip = pod_check.CHIPS["v5e"]
    monkeypatch.setattr(pod_check, "devices_of", lambda _: (jax.devices(), chip))
    compiled = []
    monkeypatch.setattr(
        pod_check,
        "jitted_step",
        lambda config, layout: (compiled.append(config), jitted_step(config, layout))[1],
    )
    options = ["--compile-only", "--window-seconds=0.3", *SMALL]
    assert train([*options, "--lora-rank=2", "--lora-targets", "query", "down"]) == OK
    assert compiled[0].lora == LoraConfig(rank=2, targets=("query", "down"))
    said = capsys.readouterr().out
    assert "adapters of rank 2 of query, down" in said
    assert said.splitlines()[-1] == "fits"


def test_what_the_compiler_cannot_place_does_not_fit(monkeypatch):
    class Lowered:
        def lower(self, *arguments):
            return self

        def compile(self):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error.\n"
                "Ran out of memory in memory space hbm. Used 33.6G of 15.75G hbm."
            )

    monkeypatch.setattr(pod_check, "jitted_step", lambda *_: Lowered())
    monkeypatch.setattr(pod_check, "devices_of", lambda _: (jax.devices(), pod_check.CHIPS["v5e"]))
    with Console().capture() as _:
        console = Console(record=True)
        assert not pod_check.check(CONFIG, 20, "v5e:4x4", "fsdp=2", console)
    assert "does not fit: Ran out of memory in memory space hbm. Used 33.6G" in (
        console.export_text().replace("\n", " ")
    )


def test_unknown_topologies_and_a_missing_compiler_are_one_sentence(monkeypatch):
    with pytest.raises(InputError, match="'v9:4x4'; choose v5e, v5p, v6e"):
        pod_check.devices_of("v9:4x4")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"install vampnet-jax\[tpu\]"):
        pod_check.devices_of("v5e:4x4")


@pytest.mark.slow
def test_the_step_compiles_for_a_tpu_slice():
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install '.[tpu]'")
    devices, chip = pod_check.devices_of("v5e:2x4")
    assert len(devices) == 8
    layout = plan(CONFIG.model, 8, None, devices=devices)
    report = pod_check.measure(pod_check.compile_step(CONFIG, layout, 20), CONFIG, 20, chip)
    assert 0 < report.needs.memory < chip.memory
    assert report.needs.collectives
