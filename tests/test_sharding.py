"""Training on many devices: where arrays lie, and that it is the same training."""

import dataclasses
import functools
import json
import math

import jax
import numpy as np
import pytest
import simulated_training as simulated
from jax.sharding import AbstractMesh, PartitionSpec

import vampnet_jax as vampnet
from codec_bridge import InputError
from vampnet_jax.training.config import preset_config
from vampnet_jax.training.distributed import job
from vampnet_jax.training.sharding import AXES, Layout, plan
from vampnet_jax.training.step import abstract_state

SMALL = vampnet.ModelConfig(n_codebooks=3, n_layers=2, n_heads=2, embedding_dim=16, vocab_size=32)
ONE_DEVICE = "data=1,fsdp=1,tensor=1"
MESHES = ["data=8", "fsdp=8", "data=2,fsdp=2,tensor=2"]
LORA = "data=2,fsdp=2,tensor=2+lora"
TWO = ["fsdp=8+2", "fsdp=8+lora"]
"""In two processes: accumulating, and with adapters."""


@pytest.fixture(scope="module")
def runs() -> dict[str, dict]:
    """The same training on one and on eight simulated devices, and in two processes of four."""
    coordinator = f"localhost:{simulated.free_port()}"
    several = [simulated.start(4, *TWO, job=(coordinator, 2, n)) for n in range(2)]
    one = simulated.start(8, ONE_DEVICE, *MESHES, f"{ONE_DEVICE}+lora", LORA)
    # Gloo prints before the result.
    joined, apart = (
        json.loads(simulated.finish(*each).splitlines()[-1]) for each in (several, [one])
    )
    return apart | joined


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MESHES, LORA, *TWO])
def test_losses_are_the_same_on_one_and_eight_devices_and_in_two_processes(runs, name):
    wanted, found = runs[ONE_DEVICE + "+lora" * name.endswith("lora")], runs[name]
    assert (wanted["devices"], found["devices"]) == (1, 8)
    assert len(found["losses"]) == simulated.STEPS
    np.testing.assert_allclose(found["losses"], wanted["losses"], rtol=1e-5)
    assert wanted["losses"][-1] != wanted["losses"][0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shards"),
    [
        ("fsdp=8", 8),
        ("data=2,fsdp=2,tensor=2", 4),
        (LORA, 4),
        ("fsdp=8+2", 8),
        ("fsdp=8+lora", 8),
    ],
)
def test_each_device_holds_its_share_of_parameters_and_moments_or_what_is_adapted(
    runs, name, shards
):
    found = runs[name]
    assert max(found["bytes"]) <= found["total"] / shards * 1.05


@functools.cache
def full_size_state(preset):
    config = preset_config(preset, preset, {}, codec_codebooks=14, codebook_size=1024, latent_dim=8)
    return abstract_state(config)


@pytest.mark.parametrize("preset", ["coarse", "fine"])
@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (1, 256, 1), (4, 16, 4)])
def test_parameters_and_moments_of_the_published_models_are_divided_evenly(preset, sizes):
    state = full_size_state(preset)
    layout = Layout(AbstractMesh(sizes, AXES))
    for part in (state.params, state.moments, state.ema):
        leaves = jax.tree.leaves(part)
        placed = jax.tree.leaves(layout.shardings(part))
        here = sum(
            math.prod(sharding.shard_shape(leaf.shape))
            for leaf, sharding in zip(leaves, placed, strict=True)
        )
        assert here <= sum(leaf.size for leaf in leaves) / (sizes[1] * sizes[2]) * 1.05


def test_moments_and_averages_lie_where_their_parameters_lie():
    state = full_size_state("coarse")
    placed = Layout(AbstractMesh((2, 4, 2), AXES)).shardings(state)
    assert jax.tree.leaves(placed.params) == jax.tree.leaves(placed.ema)
    assert jax.tree.leaves(placed.params) == jax.tree.leaves(placed.moments[1].mu)
    assert placed.params["blocks"]["query"].spec == PartitionSpec(None, "fsdp", "tensor", None)
    assert placed.codebooks.spec == PartitionSpec()


def test_an_axis_that_does_not_divide_an_array_leaves_it_whole():
    layout = Layout(AbstractMesh((1, 3, 2), AXES))
    shape = jax.ShapeDtypeStruct((2, 16, 2, 8), np.float32)
    placed = layout.shardings({"blocks": {"query": shape}})
    assert placed["blocks"]["query"].spec == PartitionSpec(None, None, "tensor", None)


class Device:
    """Stands in for a device of a machine that is not here."""

    platform = "cpu"

    def __init__(self, number: int) -> None:
        self.id = number
        self.process_index = number // 4


@pytest.mark.parametrize(
    ("mesh", "wanted"),
    [
        (None, (3, 4, 1)),  # fsdp takes the most that divides the width 16
        ("tensor=2", (3, 2, 2)),
        ("data=6", (6, 2, 1)),
        ("fsdp=2", (6, 2, 1)),
        ("data=3, fsdp=2, tensor=2", (3, 2, 2)),
    ],
)
def test_what_the_mesh_leaves_open_is_chosen(mesh, wanted):
    layout = plan(SMALL, 24, mesh, devices=[Device(n) for n in range(12)])
    assert tuple(layout.mesh.shape.values()) == wanted
    assert layout.batch_shards == wanted[0] * wanted[1]


def test_a_process_has_consecutive_rows_of_the_batch():
    shuffled = [Device(n) for n in np.random.default_rng(0).permutation(8)]
    layout = plan(SMALL, 16, None, devices=shuffled)
    processes = [device.process_index for device in layout.mesh.devices.flat]
    assert processes == sorted(processes)


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([(0, 32)], (0, 1)),
        ([(16, 24), (24, 32)], (1, 2)),
        ([(16, 24), (16, 24)], (2, 4)),  # tensor within the process
        # Three processes of four devices, tensor=3: the second has half of either part.
        ([(0, 8), (0, 8), (0, 8), (8, 16)], (0, 2)),
        ([(8, 16), (8, 16), (16, 24), (16, 24)], (0, 1)),
        ([(16, 24), (24, 32), (24, 32), (24, 32)], (1, 2)),
    ],
)
def test_a_process_reads_its_part_of_the_batch_or_all_if_its_rows_are_none(
    monkeypatch, rows, wanted
):
    class Batch:
        def addressable_devices_indices_map(self, shape):
            return {number: (slice(*bounds),) for number, bounds in enumerate(rows)}

    monkeypatch.setattr(Layout, "batch", Batch())
    assert Layout(AbstractMesh((1, 1, 1), AXES)).share(32) == wanted


@pytest.mark.parametrize(
    ("mesh", "batch", "words"),
    [
        ("data=3", 24, "mesh has data=3, which does not divide the number of devices, 8"),
        ("data=16,fsdp=1,tensor=1", 16, "needs 16 devices; there are 8"),
        ("tensor=4", 8, "2 heads; choose one of 1, 2"),
        ("model=2", 8, "'model=2'"),
        ("data=0", 8, "'data=0'"),
        ("data=2,data=2", 8, "'data=2'"),
        (None, 25, "batch_size to 24 or 32"),
    ],
)
def test_meshes_that_do_not_fit_are_refused_in_one_sentence(mesh, batch, words):
    with pytest.raises(InputError, match=words):
        plan(SMALL, batch, mesh, devices=[Device(n) for n in range(8)])


def test_rounded_products_are_for_one_device():
    rounding = dataclasses.replace(SMALL, dtype="bfloat16-products")
    devices = [Device(n) for n in range(8)]
    with pytest.raises(InputError, match="is for one device; choose float32 or bfloat16"):
        plan(rounding, 8, devices=devices)
    assert plan(rounding, 8, ONE_DEVICE, devices=devices).mesh.size == 1


# --- joining a job

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
BY_HAND = {
    "JAX_COORDINATOR_ADDRESS": "host:1234",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": "1",
}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


@pytest.mark.parametrize(
    ("environment", "on_tpu", "wanted"),
    [
        ({}, False, None),
        (SLURM | {"SLURM_NTASKS": "1"}, False, None),
        (KUBERNETES, False, None),  # a pod alone
        ({"JAX_NUM_PROCESSES": "1"}, True, None),
        ({}, True, {}),
        (SLURM, False, {}),
        (KUBERNETES | {"JOB_COMPLETION_INDEX": "0"}, False, {}),
        (
            SLURM | {"SLURM_STEP_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"},
            False,
            {"local_device_ids": [0, 1, 2, 3]},
        ),
        (
            SLURM | BY_HAND,
            False,
            {"coordinator_address": "host:1234", "num_processes": 2, "process_id": 1},
        ),
    ],
)
def test_a_job_of_several_processes_is_found_and_one_machine_is_left_alone(
    environment, on_tpu, wanted
):
    assert job(environment, on_tpu=on_tpu) == wanted


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"JAX_PROCESS_ID": ""}, "set JAX_PROCESS_ID as well"),
        ({"JAX_PROCESS_ID": "2"}, "from 0 to"),
        ({"JAX_NUM_PROCESSES": "two"}, "'two'"),
    ],
)
def test_a_job_described_in_part_or_wrongly_is_refused(changes, words):
    with pytest.raises(InputError, match=words):
        job(BY_HAND | changes, on_tpu=False)
