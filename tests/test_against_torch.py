"""The comparisons with PyTorch compare like with like."""

import itertools

import jax
import numpy as np
import pytest
from small_codecs import random_codec
from small_models import random_model

import vampnet_jax as vampnet
from benchmarks import against_torch, torch_vampnet, train_step
from vampnet_jax.benchmarking.flops import MatmulRate

SMALL = vampnet.ModelConfig(
    n_codebooks=2, n_layers=1, n_heads=2, embedding_dim=16, vocab_size=32, dropout=0.0
)


@pytest.fixture
def eager(monkeypatch):
    """Without compiling, which takes minutes; what is computed is the same."""
    monkeypatch.setattr(torch_vampnet.Sampler, "compile_step", lambda self: None)
    monkeypatch.setattr(against_torch.torch, "compile", lambda model, **rest: model)
    monkeypatch.setattr("vampnet_jax.benchmarking.flops.WORK", 1e6)


def test_every_round_runs_everybody_once_and_the_order_turns():
    calls = []
    contestants = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    seconds = against_torch.alternate(contestants, 3)
    assert "".join(calls) == "abab" + "abbaab"  # two to warm up, three rounds
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_ratios_are_of_the_same_round():
    seconds = {"x jax": [1.0, 2.0], "x eager": [3.0, 3.0], "x compiled": [2.0, 1.0]}
    assert against_torch.ratios(seconds, ("x",)) == {
        "x eager": [3.0, 1.5],
        "x compiled": [2.0, 0.5],
    }


def test_the_official_part_prints_ratios_and_shares(eager, capsys):
    result = against_torch.official(2, SMALL, frames=12)
    assert set(result["times as fast as"]) == {
        f"{work} {side}" for work in ("forward", "steps") for side in ("eager", "compiled")
    }
    assert all(len(values) == 2 for rows in result.values() for values in rows.values())
    assert all(v > 0 for v in itertools.chain(*result["matmul FLOP/s"].values()))
    against_torch.show("a title", result)
    shown = capsys.readouterr().out
    assert "forward jax, share of jax's matmul rate" in shown
    assert "GFLOP/s" in shown


def test_both_sides_vamp_the_same_windows(eager):
    """With greedy decoding and no noise the tokens are the same, so the work is."""
    model = random_model(random_codec())
    greedy = {
        name: vampnet.SamplingOptions(
            steps=steps, sample_cutoff=0.0, mask_temperature=0.0, typical_mass=None
        )
        for name, steps in (("coarse", 3), ("fine", 2))
    }
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, (2, 8, 95), np.int32)
    mask = rng.random(tokens.shape) < 0.7
    ours = np.asarray(vampnet.vamp(model, tokens, mask, jax.random.key(0), **greedy))
    samplers = {
        name: torch_vampnet.Sampler(
            torch_vampnet.from_params(stage.params, stage.config), greedy[name]
        )
        for name, stage in (("coarse", model.coarse), ("fine", model.fine))
    }
    windows = {"coarse": model.coarse_window, "fine": model.fine_window}
    theirs = against_torch.torch_vamp(samplers, windows, tokens, mask)
    np.testing.assert_array_equal(theirs[~mask], tokens[~mask])
    assert (ours == theirs).mean() > 0.99


def test_both_sides_multiply_as_much():
    rate = MatmulRate(SMALL, 12)
    theirs = against_torch.TorchMatmulRate(SMALL, 12, rate)
    assert theirs.flops == rate.flops
    assert theirs() > 0


@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-4), ("bfloat16-products", 3e-3)])
def test_both_sides_take_the_same_training_step(dtype, close):
    """The loss agrees before the first step, and after it, as the update was the same."""
    config = train_step.tiny_config(
        n_layers=1, n_heads=2, embedding_dim=16, n_codebooks=2, batch_size=2, warmup_steps=0,
        schedule="constant", ema_decay=0.0, dtype=dtype,
    )  # fmt: skip
    contestants = train_step.contestants(config, 20, 3)
    ours, theirs = ([contestants[name]() for _ in range(3)] for name in ("step jax", "step eager"))
    assert ours == pytest.approx(theirs, rel=close)
    if dtype != "float32":
        exactly = [contestants["step jax float32"]() for _ in range(3)]
        assert ours != exactly == pytest.approx(ours, rel=close)
