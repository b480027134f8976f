"""Audio in, variations out: lengths, levels, seeds, and every way to change a clip.

Clips of 40 frames (0.32 s) share one compiled program, so most tests use those.
"""

import dataclasses

import jax
import numpy as np
import pytest
from small_codecs import random_codec
from small_models import random_model

from codec_bridge.audio import Audio, loudness
from codec_bridge.errors import InputError
from vampnet_jax import pipeline
from vampnet_jax.pipeline import Clip, Edit
from vampnet_jax.prompts import Prompt
from vampnet_jax.sampling import SamplingOptions

RATE, HOP, CODEBOOKS = 8000, 64, 8
FEW_STEPS = {"coarse": SamplingOptions(steps=2), "fine": SamplingOptions(steps=1)}
KEEP_ALL = Prompt(periodic=1)


@pytest.fixture(scope="module")
def model():
    return random_model(random_codec())


def music(seconds: float = 0.32, channels: int = 1, rate: int = RATE, level: float = 0.1):
    """Chords with an envelope, different in each channel."""
    time = np.arange(round(seconds * rate)) / rate
    rows = [
        sum(np.sin(2 * np.pi * f * (1 + channel / 7) * time) for f in (220, 277, 330, 1500))
        for channel in range(channels)
    ]
    return (level * np.stack(rows) * (1 + np.sin(9 * time)) / 4).astype(np.float32)


def clip_of(n_frames: int, n_samples: int | None = None, channels: int = 1) -> Clip:
    tokens = np.random.default_rng(0).integers(0, 64, (channels, CODEBOOKS, n_frames))
    return Clip(tokens.astype(np.int32), n_frames * HOP if n_samples is None else n_samples)


def generate(model, clip, prompt=KEEP_ALL, seed=0, **options):
    return pipeline.generate(model, clip, prompt, seed=seed, **FEW_STEPS | options)


def vamp(model, samples, rate=RATE, prompt=Prompt(), seed=0, **options):  # noqa: B008
    """Samples `[N, channels, n]` of all variations."""
    audio = Audio(samples, rate)
    made = pipeline.vamp_audio(model, audio, prompt, seed=seed, **FEW_STEPS | options)
    assert {variation.rate for variation in made} == {RATE}
    return np.stack([variation.samples for variation in made])


@pytest.mark.parametrize(
    ("rate", "seconds"), [(8000, 0.32), (44_100, 0.32), (192_000, 0.313), (8000, 0.1)]
)
def test_the_output_is_as_long_as_the_input(model, rate, seconds):
    out = vamp(model, music(seconds, rate=rate), rate)
    assert out.dtype == np.float32
    assert out.shape[:2] == (1, 1)
    assert abs(out.shape[2] - seconds * RATE) <= 1


def test_stretch_and_extension_make_it_longer(model):
    edit = Edit(stretch=3, extend=0.08)
    assert vamp(model, music(0.16), edit=edit).shape[2] == 3 * 1280 + 640


def test_kept_tokens_come_back_untouched(model):
    clip = clip_of(40)
    prompt = Prompt(periodic=5, upper_codebooks=3)
    made = generate(model, clip, prompt, n_variations=2)
    for tokens, mask in zip(made.tokens, made.mask, strict=True):
        np.testing.assert_array_equal(tokens[:, ~mask], clip.tokens[:, ~mask])
        assert (tokens[:, mask] != clip.tokens[:, mask]).mean() > 0.9
    assert made.mask.shape == (2, CODEBOOKS, 40)
    np.testing.assert_array_equal(made.prompts, clip.tokens)


def test_variations_differ_and_the_seed_repeats_them(model):
    clip = clip_of(40)
    first, again, other = (
        generate(model, clip, Prompt(), seed, n_variations=2) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert (first.tokens[0] != first.tokens[1]).mean() > 0.9
    assert (first.tokens != other.tokens).mean() > 0.9


def test_a_variation_does_not_depend_on_how_many_there_are(model):
    clip = clip_of(40)
    prompt = Prompt(periodic=7, dropout=0.3)
    one, three = (generate(model, clip, prompt, n_variations=n) for n in (1, 3))
    np.testing.assert_array_equal(one.mask[0], three.mask[0])
    assert (one.tokens[0] == three.tokens[0]).mean() > 0.99


def test_channels_share_prompt_and_draws(model):
    clip = clip_of(40)
    same = Clip(np.concatenate([clip.tokens, clip.tokens]), clip.n_samples)
    made = generate(model, same, Prompt(periodic=6))
    np.testing.assert_array_equal(made.tokens[0, 0], made.tokens[0, 1])


def test_channels_stay_apart_only_if_asked_for(model):
    options = {"prompt": Prompt(periodic=2, upper_codebooks=8)}
    stereo = vamp(model, music(channels=2), stereo=True, **options)
    assert stereo.shape == (1, 2, 2560)
    assert np.abs(stereo[0, 0] - stereo[0, 1]).max() > 1e-3
    eight = music(channels=8)
    mixed = vamp(model, eight, **options)
    assert mixed.shape == (1, 1, 2560)
    np.testing.assert_array_equal(mixed, vamp(model, eight.mean(axis=0, keepdims=True), **options))
    assert vamp(model, eight, stereo=True, **options).shape == (1, 2, 2560)
    assert vamp(model, music(), stereo=True, **options).shape == (1, 1, 2560)


@pytest.mark.parametrize("rate", [8000, 11_025, 44_100])
@pytest.mark.parametrize("n_samples", [5120, 5121, 7777])
def test_frames_of_a_recording_are_known_beforehand(model, rate, n_samples):
    clip = pipeline.encode(model, Audio(np.zeros((1, n_samples), np.float32), rate))
    assert clip.tokens.shape[-1] == pipeline.frames_of_recording(model, n_samples, rate)


@pytest.mark.parametrize("level", [0.01, 0.1])
@pytest.mark.parametrize("upper", [None, CODEBOOKS])
def test_loudness_of_the_input_comes_back(model, level, upper):
    audio = music(0.64, level=level)
    out = vamp(model, audio, prompt=Prompt(periodic=7, width=3, upper_codebooks=upper))
    measured = [loudness(Audio(samples, RATE)) for samples in (audio, out[0])]
    assert measured[1] == pytest.approx(measured[0], abs=0.1)


def test_kept_passages_keep_their_level(model):
    """Nothing is generated here, so only the codec may change the level."""
    clip = pipeline.encode(model, Audio(music(0.64, level=0.02), RATE))
    through_codec = np.asarray(model.codec.decode(clip.tokens))[:, : clip.n_samples]
    out = vamp(model, music(0.64, level=0.02), prompt=KEEP_ALL)
    assert abs(clip.gain_db) > 6
    np.testing.assert_allclose(out[0], through_codec / 10 ** (clip.gain_db / 20), atol=1e-6)


@pytest.mark.parametrize(
    ("chosen", "length"),
    [([], 0), ([0, 0], 0), ([1], 1), ([1, 1, 0, 1], 2), ([0, 1, 0, 1, 1, 1], 3), ([1, 1], 2)],
)
def test_longest_run(chosen, length):
    assert pipeline.longest_run(np.array(chosen, bool)) == length


def test_peaks_stay_within_one(model):
    audio = np.clip(100 * music(), -1, 1)
    assert np.abs(vamp(model, audio)).max() <= 1


@pytest.mark.parametrize("prompt", [Prompt(), Prompt(periodic=7), Prompt(onset=2, beat=0.1)])
def test_silence_works(model, prompt):
    out = vamp(model, np.zeros((1, 2560), np.float32), prompt=prompt)
    assert np.isfinite(out).all()


def test_stretch_keeps_first_copies_only(model):
    clip = clip_of(10)
    made = generate(model, clip, edit=Edit(stretch=4))
    assert made.tokens.shape == (1, 1, CODEBOOKS, 40)
    np.testing.assert_array_equal(made.tokens[0, ..., ::4], clip.tokens)
    np.testing.assert_array_equal(np.flatnonzero(~made.mask[0, 0]), range(0, 40, 4))
    assert (made.tokens[0, ..., 1::4] != clip.tokens).mean() > 0.9


def test_extension_continues_a_clip_that_stays(model):
    clip = clip_of(20)
    made = generate(model, clip, edit=Edit(extend=0.16))
    assert made.tokens.shape[-1] == 20 + 20
    np.testing.assert_array_equal(made.tokens[0, ..., :20], clip.tokens)
    assert made.mask[0, :, 20:].all()
    assert not made.mask[0, :, :20].any()
    assert made.n_samples == 20 * HOP + 0.16 * RATE


def test_extension_replaces_a_last_frame_that_is_half_silence(model):
    made = generate(model, clip_of(20, n_samples=19 * HOP + 20), edit=Edit(extend=0.16))
    assert made.mask[0, :, 19:].all()
    assert not made.mask[0, :, :19].any()


def test_from_nothing_everything_is_generated(model):
    made = generate(model, None, edit=Edit(extend=0.313))
    assert made.mask.all()
    assert made.tokens.shape == (1, 1, CODEBOOKS, 40)
    assert len(np.unique(made.tokens)) > 32
    assert pipeline.decode(model, made, 0).samples.shape == (1, 2504)


def test_feedback_vamps_the_result_with_other_frames_kept(model):
    clip = clip_of(42)
    prompt = Prompt(periodic=6, upper_codebooks=8)
    once, twice = (generate(model, clip, prompt, edit=Edit(feedback=n)) for n in (0, 1))
    np.testing.assert_array_equal(once.mask, twice.mask)
    kept_second = ~np.asarray(
        prompt.mask((CODEBOOKS, 42), _prompt_key(0), frame_rate=125.0, pass_index=1)
    )
    assert not (kept_second & ~once.mask[0]).any()  # other frames than in the first pass
    same = twice.tokens[0, 0] == once.tokens[0, 0]
    assert same[kept_second].all()
    assert same[~kept_second].mean() < 0.1


def _prompt_key(seed: int) -> jax.Array:
    """The key of the first variation's prompt."""
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), 0))[0]


def test_own_mask_is_obeyed_and_joins_the_prompt(model):
    clip = clip_of(40)
    own = np.random.default_rng(1).integers(0, 2, (CODEBOOKS, 40)).astype(bool)
    made = generate(model, clip, Prompt(), edit=Edit(mask=own))
    np.testing.assert_array_equal(made.mask[0], own)
    joined = generate(model, clip, Prompt(prefix=0.08), edit=Edit(mask=own))
    np.testing.assert_array_equal(joined.mask[0], own & (np.arange(40) >= 10))
    with pytest.raises(InputError, match="mask has shape"):
        generate(model, clip, Prompt(), edit=Edit(mask=own[:, 1:]))


def test_pitch_shift_moves_what_is_encoded(model):
    tone = np.sin(2 * np.pi * 440 * np.arange(RATE, dtype=np.float32) / RATE)[None]
    plain, shifted = (pipeline.encode(model, Audio(tone, RATE), pitch=pitch) for pitch in (0, 12))
    assert shifted.n_samples == plain.n_samples

    def strongest(clip):
        return np.abs(np.fft.rfft(clip.audio.samples[0])).argmax()

    assert strongest(shifted) == pytest.approx(2 * strongest(plain), rel=0.02)


def test_rhythm_comes_from_the_clip_or_from_its_decoded_tokens(model):
    clicks = np.zeros((1, 2 * RATE), np.float32)
    clicks[0, 4000::4000] = 1.0
    clicks += 1e-3 * np.random.default_rng(0).standard_normal(clicks.shape).astype(np.float32)
    clip = pipeline.encode(model, Audio(clicks, RATE))
    made = generate(model, clip, Prompt(onset=2))
    kept = np.flatnonzero(~made.mask[0, 0]) * HOP / RATE
    assert made.unheard == ()
    assert all(np.abs(kept - time).min() < 0.05 for time in (0.5, 1.0, 1.5))
    decoded = np.asarray(model.codec.decode(clip.tokens))[:, : clip.n_samples]
    no_audio = dataclasses.replace(clip, audio=None)
    from_tokens = generate(model, no_audio, Prompt(onset=2))
    heard = dataclasses.replace(clip, audio=Audio(decoded, RATE))
    np.testing.assert_array_equal(from_tokens.mask, generate(model, heard, Prompt(onset=2)).mask)
    assert not from_tokens.mask.all()
    silent = pipeline.encode(model, Audio(0 * clicks[:, :2560], RATE))
    assert generate(model, silent, Prompt(onset=2, beat=0.1)).unheard == ("onsets", "beats")


def test_progress_tells_every_stage_to_its_end(model):
    last: dict[str, tuple[int, int]] = {}

    def report(stage, done, total):
        assert 0 <= done <= total
        assert done >= last.get(stage, (0, 0))[0]
        last[stage] = (done, total)

    vamp(model, music(), edit=Edit(feedback=1), on_progress=report)
    assert set(last) == {"encode", "coarse", "fine", "decode"}
    assert all(done == total > 0 for done, total in last.values())


@pytest.mark.parametrize(
    ("audio", "words"),
    [
        (np.zeros((1, 160), np.float32), "lasts only 0.020 s"),
        (np.zeros((1, 0), np.float32), "lasts only 0.000 s"),
        (np.full((1, RATE), np.nan, np.float32), "not finite"),
    ],
)
def test_audio_that_cannot_be_vamped_is_refused(model, audio, words):
    with pytest.raises(InputError, match=words):
        vamp(model, audio)


@pytest.mark.parametrize(
    "options", [{"stretch": 0}, {"extend": -1.0}, {"extend": float("nan")}, {"feedback": -1}]
)
def test_edits_that_make_no_sense_are_refused(options):
    with pytest.raises(InputError, match=f"^{next(iter(options))} is"):
        Edit(**options)


def test_long_audio_is_vamped_in_windows(model):
    """Of 40 and 20 frames; so what lies 80 frames away does not matter."""
    clip = clip_of(400)
    prompt = Prompt(periodic=7, offset=0)
    made = generate(model, clip, prompt)
    assert made.tokens.shape == (1, 1, CODEBOOKS, 400)
    changed = np.where(np.arange(400) >= 200, 5, clip.tokens)
    other = generate(model, dataclasses.replace(clip, tokens=changed), prompt)
    np.testing.assert_array_equal(made.tokens[..., :120], other.tokens[..., :120])
    assert (made.tokens[..., 200:] != other.tokens[..., 200:]).any()


def test_what_later_passes_replace_is_not_kept(model):
    """So the loudness of the input is restored, though every pass keeps a passage."""
    prompt = Prompt(periodic=60, width=51, offset=0, upper_codebooks=CODEBOOKS)
    clip = pipeline.encode(model, Audio(music(2.0), RATE))
    once, thrice = (generate(model, clip, prompt, edit=Edit(feedback=n)) for n in (0, 3))
    np.testing.assert_array_equal(once.mask, thrice.mask)
    np.testing.assert_array_equal(once.mask, once.replaced)
    assert pipeline.longest_run(~once.replaced[0].any(axis=0)) / RATE * HOP >= pipeline.PASSAGE
    assert pipeline.longest_run(~thrice.replaced[0].any(axis=0)) / RATE * HOP < pipeline.PASSAGE
    sound = pipeline.decode(model, thrice, 0)
    assert loudness(sound) == pytest.approx(clip.loudness - clip.gain_db, abs=0.1)
    kept_level = pipeline.decode(model, once, 0)
    assert abs(loudness(kept_level) - (clip.loudness - clip.gain_db)) > 0.5
