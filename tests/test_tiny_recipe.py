"""The parts of `recipes/tiny` that decide what is learnt from: splits, variants, losses."""

import sys
from pathlib import Path

import pytest
import torch

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny"


@pytest.fixture(autouse=True)
def recipe_modules(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPE))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if (
            getattr(sys.modules[name], "__file__", None)
            and str(RECIPE) in sys.modules[name].__file__
        ):
            del sys.modules[name]


def test_a_new_source_gets_all_three_sides_and_works_stay_whole():
    from cache_music import assign

    split = {"train": [], "validation": [], "test": []}
    seconds = {f"work{i}--movement{j}": 60.0 for i in range(12) for j in range(2)}
    assign(split, "scores", seconds)
    assert all(split.values())
    side_of = {name: side for side, names in split.items() for name in names}
    assert len(side_of) == 24
    for i in range(12):
        assert len({side_of[f"scores/work{i}--movement{j}"] for j in range(2)}) == 1


def test_what_comes_later_never_changes_validation_and_test_tracks():
    from cache_music import assign

    split = {"train": ["game/a"], "validation": ["game/b"], "test": ["game/c"]}
    assign(
        split, "game", {x: 60.0 for x in ("a", "b", "c", "a~1", "b~1", "c~2", "c-old", "d", "e")}
    )
    assert split["validation"] == ["game/b"]
    assert split["test"] == ["game/c"]
    assert sorted(split["train"]) == ["game/a", "game/a~1", "game/d", "game/e"]


def test_shifted_copies_go_up_and_down_by_one_to_three_semitones():
    from augment_music import semitones

    names = [f"game/track{i}" for i in range(50)]
    assert {semitones(name, 1) for name in names} == {1, 2, 3}
    assert {semitones(name, 2) for name in names} == {-1, -2, -3}
    assert semitones(names[0], 1) == semitones(names[0], 1)


def test_a_shifted_copy_has_the_pitch_and_length_of_a_faster_tape(tmp_path):
    import numpy as np
    import soundfile
    from augment_music import shift

    rate = 24_000
    soundfile.write(
        tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate), rate
    )
    seconds = shift(tmp_path / "a.wav", tmp_path / "b.wav", 3)
    audio, _ = soundfile.read(tmp_path / "b.wav")
    peak = np.abs(np.fft.rfft(audio * np.hanning(len(audio)))).argmax() * rate / len(audio)
    assert peak == pytest.approx(440 * 2 ** (3 / 12), abs=2)
    assert seconds == pytest.approx(2 ** (-3 / 12), abs=0.01)


def test_buzz_is_treble_that_repeats_with_the_frame_rate():
    from tune_decoder import HOP, Buzz

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 1, 24 * HOP, generator=generator)
    frame = torch.randn(1, 1, HOP, generator=generator).repeat(1, 1, 24)
    buzz = Buzz()
    assert buzz(frame, noise) > 0.8
    assert buzz(noise, frame) > 0.8  # music may repeat too
    assert buzz(noise, noise) == 0
    slow = torch.sin(2 * torch.pi * 200 / 24_000 * torch.arange(24 * HOP))[None, None]
    assert buzz(noise + 20 * slow, noise) < 0.1  # bass is none of it


def test_the_adversary_learns_and_its_losses_reach_only_whom_they_should():
    from adversary import decoder_losses, discriminator, discriminator_loss

    torch.manual_seed(0)
    judge = discriminator(24_000)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=1e-3)
    time = torch.arange(6000) / 24_000
    music = torch.sin(2 * torch.pi * 440 * time)[None, None]
    made = (0.3 * torch.randn(1, 1, 6000)).requires_grad_()
    first = discriminator_loss(judge, made, music)
    for _ in range(4):
        optimizer.zero_grad()
        discriminator_loss(judge, made, music).backward()
        optimizer.step()
    assert made.grad is None
    assert discriminator_loss(judge, made, music) < 0.8 * first
    verdict, features = decoder_losses(judge, made, music)
    judge.requires_grad_(False)
    (verdict + features).backward()
    assert made.grad.abs().sum() > 0
    same_verdict, same_features = decoder_losses(judge, music, music)
    assert same_features == 0
    assert same_verdict < verdict
