"""The measures of `vampnet_jax.evaluation` against closed forms and against what one would hear."""

from importlib.util import find_spec

import jax
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from codec_bridge.descript import stand_in_for_broken_torchaudio
from codec_bridge.errors import InputError
from vampnet_jax.evaluation import embeddings
from vampnet_jax.evaluation.artefacts import clicks, seam_ranks, window_borders
from vampnet_jax.evaluation.distances import Spectra, mel_distance, stft_distance
from vampnet_jax.evaluation.embeddings import crepe_tiny, mel_statistics
from vampnet_jax.evaluation.intervals import centred_interval, mean_interval, percentiles, resampled
from vampnet_jax.evaluation.sets import frechet_distance, kernel_distance
from vampnet_jax.evaluation.token_scores import score_tokens, token_diversity

RATE = 24_000


def tone(seconds: float = 1.0, pitch: float = 440.0) -> np.ndarray:
    t = np.arange(int(seconds * RATE)) / RATE
    sound = np.sum([np.sin(2 * np.pi * pitch * k * t) / k for k in range(1, 6)], axis=0)
    return (0.1 * sound).astype(np.float32)


def noise(level: float, n: int, seed: int = 0) -> np.ndarray:
    return (level * np.random.default_rng(seed).standard_normal(n)).astype(np.float32)


@pytest.mark.parametrize("distance", [mel_distance, stft_distance])
def test_a_recording_is_at_distance_0_of_itself_and_noise_takes_it_away(distance):
    a = tone()
    assert distance(a, a) == 0
    steps = [distance(a, a + noise(level, len(a))) for level in (1e-4, 1e-3, 1e-2)]
    assert 0 < steps[0] < steps[1] < steps[2]
    assert distance(a, a[:-3]) == 0  # the longer one is cut
    assert np.isfinite(distance(np.zeros(3000, np.float32), a))


def test_twice_as_loud_is_log10_of_2_in_each_of_the_two_resolutions():
    a = tone() + noise(0.1, RATE)  # no band is below the floor
    assert mel_distance(a, 2 * a) == pytest.approx(2 * np.log10(2), abs=1e-4)
    assert Spectra(a).log_mel(2048, 150).shape == (150, 1 + RATE // 512)


@given(st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_frechet_distance_is_that_of_the_two_normal_distributions(seed, d):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(40, d)) @ rng.normal(size=(d, d)), rng.normal(1, 2, size=(30, d))
    sa, sb = (np.atleast_2d(np.cov(x.T)) for x in (a, b))
    eigenvalues = np.linalg.eigvals(sa @ sb)
    root = np.sqrt(np.maximum(eigenvalues.real, 0)).sum()
    wanted = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(sa) + np.trace(sb) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-6, abs=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)


def test_frechet_distance_works_with_fewer_recordings_than_dimensions():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(20, 100)), rng.normal(size=(20, 100))
    assert 0 < frechet_distance(a, b) < frechet_distance(a, b + 1)


def test_kernel_distance_is_unbiased_and_sees_a_shift():
    rng = np.random.default_rng(1)
    same = [kernel_distance(*rng.normal(size=(2, 30, 4))) for _ in range(200)]
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(200)
    a, b = rng.normal(size=(2, 30, 4))
    brute = np.mean([np.exp(-np.square(x - y).sum() / 8) for x in a for y in b])
    within = [
        np.mean(
            [
                np.exp(-np.square(s[i] - s[j]).sum() / 8)
                for i in range(30)
                for j in range(30)
                if i != j
            ]
        )
        for s in (a, b)
    ]
    assert kernel_distance(a, b, bandwidth=2.0) == pytest.approx(100 * (sum(within) - 2 * brute))
    assert kernel_distance(a, b + 2) > 10


def normal_sets(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of 20 dimensions: a reference `[n, 20]`; a condition, codec, random `[n, 3, 20]`.

    The three have the same other excerpts behind them.
    """
    rng = np.random.default_rng(seed)
    scale = np.exp(-np.arange(20) / 5)
    reference, music = rng.normal(size=(2, n, 20)) * scale
    noise = rng.normal(size=(3, n, 20)) * scale
    codec = music + 0.15 * noise[0]
    made = 0.7 * music + 0.5 * noise[1] + 0.3 * scale
    random = 0.2 * music + 0.2 * noise[2] + 0.9 * scale
    return reference, np.stack([made, codec, random], axis=1)


def of_codec_and_share(reference: np.ndarray, sets: np.ndarray) -> np.ndarray:
    """The codec's Fréchet distance, and the condition's share between codec and random."""
    own, best, worst = (frechet_distance(reference, sets[:, i]) for i in range(3))
    return np.array([best, (own - best) / (worst - best)])


def test_few_excerpts_bias_the_frechet_distance_but_hardly_the_share():
    true = of_codec_and_share(*normal_sets(4000, 0))
    small = np.mean([of_codec_and_share(*normal_sets(40, seed)) for seed in range(1, 41)], axis=0)
    assert small[0] > 2 * true[0]
    assert small[1] == pytest.approx(true[1], abs=0.02)


def test_centred_intervals_hold_the_mean_of_the_estimate_where_percentiles_miss_it():
    trials = [normal_sets(40, seed) for seed in range(1, 31)]
    estimates = np.array([of_codec_and_share(*trial) for trial in trials])
    centred, between_percentiles = np.zeros(2), np.zeros(2)
    for estimate, trial in zip(estimates, trials, strict=True):
        draws = resampled(of_codec_and_share, *trial, n=60, paired=False)
        for i, mean in enumerate(estimates.mean(axis=0)):
            _, low, high = centred_interval(estimate[i], draws[:, i])
            centred[i] += low <= mean <= high
            low, high = percentiles(draws[:, i])
            between_percentiles[i] += low <= mean <= high
    assert (centred >= 26).all()
    assert between_percentiles[0] < 10


def test_variations_that_differ_more_are_more_diverse():
    tokens = np.zeros((3, 2, 4), int)
    assert token_diversity(tokens) == 0
    tokens[2] = 1
    assert token_diversity(tokens) == pytest.approx(2 / 3)


def test_intervals_hold_the_true_mean_as_often_as_they_say():
    rng = np.random.default_rng(2)
    held = 0
    for i in range(200):
        interval = mean_interval(rng.normal(size=40), n=200, seed=i)
        held += interval.low <= 0 <= interval.high
    assert 180 <= held <= 199  # 95 % of 200, within three standard errors and small-sample bias
    x = rng.normal(size=50)
    assert mean_interval(x) == mean_interval(x)
    shifts = resampled(lambda a, b: (a - b).mean(), x + 1, x, n=20)
    np.testing.assert_allclose(shifts, np.ones(20))
    unpaired = resampled(lambda a, b: (a - b).mean(), x + 1, x, n=2000, paired=False)
    assert unpaired.std() == pytest.approx(np.sqrt(2 / 50) * x.std(), rel=0.1)
    assert resampled(lambda a: np.array([a.min(), a.max()]), x, n=7).shape == (7, 2)
    with pytest.raises(ValueError, match="paired"):
        resampled(lambda a, b: 0.0, x, x[:3])


def test_a_centred_interval_is_as_wide_as_the_resamples_around_the_figure():
    values = np.linspace(10, 20, 1001)
    assert centred_interval(3.0, values) == pytest.approx((3, 3 - 4.75, 3 + 4.75))


def test_embeddings_of_a_pitch_are_nearer_to_it_than_to_noise():
    sounds = (tone(), tone(pitch=450), noise(0.1, RATE))
    a, b, c = (mel_statistics(Spectra(x)) for x in sounds)
    assert a.shape == (160,)
    assert np.linalg.norm(a - b) < np.linalg.norm(a - c)


def test_what_is_too_quiet_to_be_heard_does_not_change_mel_statistics():
    plain, hissing, noisy = (
        mel_statistics(Spectra(tone() + noise(level, RATE))) for level in (0, 1e-5, 1e-2)
    )
    np.testing.assert_allclose(hissing, plain, atol=1e-3)
    assert np.linalg.norm(noisy - plain) > 0.1


@pytest.mark.skipif(find_spec("torchcrepe") is None, reason="needs the extra `evaluate`")
def test_crepe_hears_pitch_and_not_level():
    a, b, c = (crepe_tiny(Spectra(x)) for x in (tone(), tone() * 0.5, tone(pitch=700)))
    assert a.shape == (512,)
    assert np.linalg.norm(a - b) < 0.2 * np.linalg.norm(a - c)


def test_clicks_are_found_where_they_are_and_music_has_none():
    sound = tone(2.0) + noise(1e-3, 2 * RATE)
    assert len(clicks(sound, RATE)) == 0
    broken = sound.copy()
    broken[[10_000, 30_000]] += 0.3
    np.testing.assert_allclose(clicks(broken, RATE), [10_000 / RATE, 30_000 / RATE], atol=1e-3)
    cut = np.concatenate([tone(1.0), -tone(1.0, 311.0)[700:]])
    assert len(clicks(cut, RATE)) == 1
    burst = noise(1e-3, RATE)
    burst[RATE // 2 :] += noise(0.1, RATE // 2, 1) * np.exp(-np.arange(RATE // 2) / 2400)
    assert len(clicks(burst.astype(np.float32), RATE)) == 0  # a drum is no click


def test_borders_are_where_another_window_takes_over():
    assert window_borders([[0]], 40, 30) == []
    assert window_borders([[0], [30]], 40, 70) == [40]
    # First 0-20, 30-50 and 50-70; 15-35 fills what is between, and 45-65 nothing.
    assert window_borders([[0, 30, 50], [15, 45]], 20, 70) == [20, 30, 50]


def test_seams_are_told_from_borders_that_cannot_be_heard():
    hop, borders = 480, [100, 200, 300, 400]
    steady = noise(0.1, 500 * hop)
    # The mean of n ranks has a standard error of 1 / √(12 n).
    error = 1 / np.sqrt(12 * len(borders))
    assert (abs(seam_ranks(steady, RATE, hop, borders).mean(axis=1) - 0.5) < 3 * error).all()
    cut = steady.copy()
    for start in borders[::2]:
        cut[start * hop : (start + 100) * hop] *= 0.3
    assert seam_ranks(cut, RATE, hop, borders).mean(axis=1).max() > 0.5 + 3 * error


def test_token_scores_are_those_of_the_head(small_codec):
    from small_models import random_model

    stage = random_model(small_codec).fine
    bias = np.zeros(stage.params["head"]["bias"].shape, np.float32)
    bias[:, 3] = 5.0
    head = {"kernel": 0 * stage.params["head"]["kernel"], "bias": jax.numpy.asarray(bias)}
    stage = stage._replace(params={**stage.params, "head": head})
    tokens = np.full((2, 8, 20), 3, np.int32)
    tokens[1, :, ::2] = 7
    mask = np.ones(tokens.shape, bool)
    scores = score_tokens(stage, tokens, mask)
    total = np.log(np.exp(5.0) + 63)
    np.testing.assert_allclose(scores.nll, [total - 5, total - 2.5], rtol=1e-5)
    np.testing.assert_allclose(scores.accuracy, [1, 0.5])


@pytest.fixture
def small_clap(tmp_path, monkeypatch):
    """A CLAP with random weights in place of the published one."""
    with stand_in_for_broken_torchaudio(empty=False):
        from transformers import (
            ClapAudioConfig,
            ClapAudioModelWithProjection,
            ClapFeatureExtractor,
        )

    torch.manual_seed(0)
    config = ClapAudioConfig(
        depths=[1, 1], num_attention_heads=[1, 1], patch_embeds_hidden_size=8, hidden_size=16,
        num_hidden_layers=2, projection_dim=12,
    )  # fmt: skip
    ClapAudioModelWithProjection(config).save_pretrained(tmp_path / "clap")
    ClapFeatureExtractor(truncation="rand_trunc").save_pretrained(tmp_path / "clap")
    monkeypatch.setattr(embeddings, "CLAP", str(tmp_path / "clap"))


@pytest.mark.skipif(find_spec("transformers") is None, reason="needs the extra `evaluate`")
def test_clap_hears_every_piece_and_gives_the_same_again(small_clap):
    rng = np.random.default_rng(0)
    first, last = (0.1 * rng.standard_normal(9 * 24_000) for _ in range(2))
    long = np.concatenate([first, last]).astype(np.float32)
    a, again, other = (embeddings.clap(Spectra(x)) for x in (long, long, long[: 9 * 24_000]))
    assert a.shape == (12,)
    np.testing.assert_array_equal(a, again)
    assert np.abs(a - other).max() > 0


@pytest.mark.skipif(find_spec("transformers") is None, reason="needs the extra `evaluate`")
def test_clap_without_its_weights_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(embeddings, "CLAP", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"the weights of CLAP, .*choose another embedding"):
        embeddings.check_installed("clap")
