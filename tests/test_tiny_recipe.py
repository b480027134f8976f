"""The parts of `recipes/tiny` that decide what is learnt from: splits, variants, losses."""

import json
import re
import sys

import jax
import numpy as np
import pytest
import torch

import codec_bridge

pytestmark = pytest.mark.usefixtures("tiny_recipe")


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


def test_held_out_tracks_need_not_be_on_disk_to_stay_held_out():
    from cache_music import assign

    split = {
        "train": ["scores/a"],
        "validation": ["scores/b--movement1"],
        "test": ["scores/c--movement1"],
    }
    found = ("a", "a~1", "b--movement2", "c--movement1~1", "d", "e")
    assign(split, "scores", {track: 60.0 for track in found})
    assert split["validation"] == ["scores/b--movement1"]
    assert split["test"] == ["scores/c--movement1"]
    assert sorted(split["train"]) == ["scores/a", "scores/a~1", "scores/d", "scores/e"]


def test_chorales_of_a_cantata_and_of_a_tune_are_one_work():
    from cache_music import assign

    split = {"train": [], "validation": ["scores/bach-bwv153.9"], "test": ["scores/bach-bwv104.6"]}
    found = ("bach-bwv153.1", "bach-bwv112.5-sc", "bach-bwv112.5-sc~1", "bach-bwv15.3")
    assign(split, "scores", {track: 60.0 for track in found})
    assert split["train"] == ["scores/bach-bwv15.3"]


def test_no_work_of_the_split_is_on_two_sides():
    from cache_music import SPLIT_FILE, work_of

    sides = {}
    for side, names in json.loads(SPLIT_FILE.read_text()).items():
        for source, track in (name.split("/", 1) for name in names):
            assert sides.setdefault((source, work_of(source, track)), side) == side


def test_no_variant_is_held_out_while_a_source_is_being_divided():
    from cache_music import assign

    split = {"train": ["game/a"], "validation": ["game/b"], "test": []}
    assign(split, "game", {x: 60.0 for x in ("a", "b", "b~1", "c", "c~1", "d")})
    held = split["validation"] + split["test"]
    assert split["test"]
    assert not any("~" in name for name in held)


def test_shifted_copies_go_up_and_down_by_one_to_three_semitones():
    from augment_music import semitones

    names = [f"game/track{i}" for i in range(50)]
    assert {semitones(name, 1) for name in names} == {1, 2, 3}
    assert {semitones(name, 2) for name in names} == {-1, -2, -3}
    assert [semitones(name, 1) for name in names[:6]] == [
        3,
        2,
        2,
        2,
        2,
        1,
    ]  # the same in every process


def test_a_shifted_copy_has_the_pitch_and_length_of_a_faster_tape(tmp_path):
    import numpy as np
    import soundfile
    from augment_music import shift

    rate = 24_000
    soundfile.write(
        tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate), rate
    )
    seconds = shift(tmp_path / "a.wav", tmp_path / "b.wav", 3)["seconds"]
    audio, _ = soundfile.read(tmp_path / "b.wav")
    peak = np.abs(np.fft.rfft(audio * np.hanning(len(audio)))).argmax() * rate / len(audio)
    assert peak == pytest.approx(440 * 2 ** (3 / 12), abs=2)
    assert seconds == pytest.approx(2 ** (-3 / 12), abs=0.01)


def test_the_gain_of_a_copy_wanders_slowly_and_within_8_decibels(tmp_path):
    import soundfile
    from augment_music import SAMPLE_RATE, shift, wander

    gains = 20 * np.log10(wander("game/track~1", 120 * SAMPLE_RATE))
    assert np.abs(gains).max() <= 8.001
    assert gains.std() > 1
    assert np.abs(np.diff(gains[::SAMPLE_RATE])).max() <= 2.001  # decibels a second
    np.testing.assert_allclose(
        gains[: 3 * 8 * SAMPLE_RATE : 8 * SAMPLE_RATE], [1.847, -0.999, 0.942], atol=1e-3
    )
    assert np.abs(gains - 20 * np.log10(wander("game/track~2", len(gains)))).max() > 1

    square = 0.1 * np.sign(np.sin(2 * np.pi * 100 * np.arange(20 * SAMPLE_RATE) / SAMPLE_RATE))
    soundfile.write(tmp_path / "a.wav", square, SAMPLE_RATE)
    shift(tmp_path / "a.wav", tmp_path / "b~1.wav", 1)
    copy, _ = soundfile.read(tmp_path / "b~1.wav")
    levels = [np.abs(part).mean() for part in np.array_split(copy, 20)]
    wanted = [part.mean() for part in np.array_split(wander("b~1", len(copy)), 20)]
    np.testing.assert_allclose(
        np.array(levels) / levels[0], np.array(wanted) / wanted[0], rtol=0.02
    )


def test_buzz_is_treble_that_repeats_with_the_frame_rate():
    from codec_losses import Buzz
    from codec_model import HOP

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 1, 24 * HOP, generator=generator)
    frame = torch.randn(1, 1, HOP, generator=generator).repeat(1, 1, 24)
    buzz = Buzz()
    assert buzz(frame, noise) > 0.8
    assert buzz(noise, frame) > 0.8  # music may repeat too
    other = torch.randn(1, 1, 24 * HOP, generator=generator)
    assert buzz(other, noise) < 0.05
    assert buzz(1e-5 * frame, noise) < 0.05  # cannot be heard
    slow = torch.sin(2 * torch.pi * 200 / 24_000 * torch.arange(24 * HOP))[None, None]
    assert buzz(noise + 20 * slow, noise) < 0.1  # bass is none of it
    middle = torch.sin(2 * torch.pi * 1000 / 24_000 * torch.arange(24 * HOP))[None, None]
    assert buzz(noise + 20 * middle, noise) > 0.3  # one of the two bands


def test_the_activation_is_that_of_the_codec_and_so_are_its_gradients():
    from snake import Snake

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 30, generator=generator, dtype=torch.float64)
    alpha = 0.5 + torch.rand(1, 5, 1, generator=generator, dtype=torch.float64)
    upstream = torch.randn(2, 5, 30, generator=generator, dtype=torch.float64)

    def plain(x, alpha):
        return x + torch.sin(alpha * x) ** 2 / (alpha + 1e-9)

    def of(function, dtype):
        leaves = [a.to(dtype).requires_grad_() for a in (x, alpha)]
        out = function(*leaves)
        return out, *torch.autograd.grad(out, leaves, upstream.to(dtype))

    for found, wanted in zip(of(Snake.apply, torch.float32), of(plain, torch.float64), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_the_codec_in_training_computes_as_the_codec_in_use(tiny_dac, tmp_path, monkeypatch):
    from codec_model import export
    from snake import Snake

    export(tiny_dac.state_dict(), tmp_path)
    codec = codec_bridge.load(tmp_path / "codec.pth")
    tokens = np.random.default_rng(0).integers(0, 1024, (1, 16, 5), np.int32)
    calls = []
    apply = Snake.apply
    monkeypatch.setattr(Snake, "apply", lambda *args: calls.append(args) or apply(*args))
    with torch.no_grad():
        z_q = tiny_dac.quantizer.from_codes(torch.from_numpy(tokens).long())[0]
        audio = tiny_dac.decoder(z_q)[0].numpy()
    assert len(calls) > 10
    monkeypatch.undo()
    expected = np.asarray(codec.decode(tokens))
    np.testing.assert_allclose(audio, expected, atol=1e-5 * np.abs(expected).max(), rtol=1e-4)


def test_jumbled_frames_have_the_tokens_of_the_music_in_other_phases():
    from codec_data import Excerpt, jumble
    from codec_model import HOP

    class Model(torch.nn.Module):
        """Tokens that say where a frame's loudest sample lies, and its sign."""

        def encoder(self, audio):
            return audio

        def quantizer(self, audio):
            frames = audio[:, 0].unfold(1, HOP, HOP)
            place = frames.abs().argmax(-1)
            sign = frames.gather(-1, place[..., None])[..., 0] > 0
            return audio, torch.stack([place, sign.long()], 1)

    audio = torch.zeros(1, 1, 40 * HOP)
    audio[..., HOP // 2 :: HOP] = 1.0  # a click in the middle of every frame
    own = torch.tensor([[HOP // 2], [1]]).repeat(1, 40)[None]
    music = Excerpt(audio, own, torch.ones(40))
    jumbled = jumble(Model(), music, np.random.default_rng(0))
    assert jumbled.tokens.shape == own.shape
    assert torch.equal(jumbled.audio, audio)
    assert not jumbled.kept.any()
    places, signs = jumbled.tokens[0].tolist()
    assert set(signs) == {0, 1}
    assert 2 < len(set(places)) <= 4
    again = jumble(Model(), music, np.random.default_rng(0))
    assert torch.equal(again.tokens, jumbled.tokens)


def test_relabelled_tokens_can_be_trained_on(tmp_path, monkeypatch, small_codec):
    from relabel_tokens import main
    from small_tokens import write_folder

    from vampnet_jax.training.tokens import CodecInfo, read_codebooks, read_manifest

    tensors = {
        name: tensor * 2 if name.startswith("decoder.") else tensor
        for name, tensor in small_codec.tensors.items()
    }
    tuned = codec_bridge.Codec("dac", small_codec.config, tensors)
    assert tuned.fingerprint != small_codec.fingerprint
    codebooks = np.asarray(small_codec.codebooks)
    info = CodecInfo(small_codec.fingerprint, "dac", 8000, 64, *codebooks.shape[:2])
    write_folder(tmp_path / "tokens", [30, 30, 30], codec=info, codebooks=codebooks)
    codec_bridge.save(small_codec, tmp_path / "codec.safetensors")
    codec_bridge.save(tuned, tmp_path / "tuned.safetensors")
    options = {"tokens": "tokens", "codec": "codec.safetensors", "tuned": "tuned.safetensors"}
    words = [word for name, file in options.items() for word in (f"--{name}", str(tmp_path / file))]
    monkeypatch.setattr(sys, "argv", ["relabel_tokens.py", *words])
    main()
    manifest = read_manifest(tmp_path / "tokens")
    assert manifest.codec.fingerprint == tuned.fingerprint
    np.testing.assert_array_equal(read_codebooks(tmp_path / "tokens", manifest.codec), codebooks)


def test_the_adversary_learns_to_tell_and_finds_music_in_music():
    from adversary import decoder_losses, discriminator_loss, new_discriminator

    torch.manual_seed(0)
    discriminator = new_discriminator(24_000)
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=1e-3)
    time = torch.arange(6000) / 24_000
    music = torch.sin(2 * torch.pi * 440 * time)[None, None]
    made = (0.3 * torch.randn(1, 1, 6000)).requires_grad_()
    first = discriminator_loss(discriminator, made, music)
    for _ in range(4):
        optimizer.zero_grad()
        discriminator_loss(discriminator, made, music).backward()
        optimizer.step()
    assert made.grad is None
    assert discriminator_loss(discriminator, made, music) < 0.8 * first
    verdict, features = decoder_losses(discriminator, made, music)
    discriminator.requires_grad_(False)
    (verdict + features).backward()
    assert made.grad.abs().sum() > 0
    same_verdict, same_features = decoder_losses(discriminator, music, music)
    assert same_features == 0
    assert same_verdict < verdict


def test_in_a_training_step_discriminator_and_decoder_keep_to_their_own_gradients():
    from adversary import new_discriminator
    from codec_data import MARGIN, Excerpt
    from codec_losses import Losses
    from codec_model import HOP
    from tune_decoder import backward

    torch.manual_seed(0)
    frames = 2 * MARGIN + 8
    decoder = torch.nn.ConvTranspose1d(4, 1, HOP, HOP)
    discriminator, losses = (
        new_discriminator(24_000),
        Losses(notes=3.0, wave=0.3, buzz=0.5, adversarial=0.03),
    )
    music = 0.1 * torch.randn(1, 1, frames * HOP)
    excerpt = Excerpt(music, torch.zeros(1, 16, frames, dtype=torch.int64), torch.ones(frames))
    z_q = torch.randn(1, 4, frames)

    def step(discriminator, learns):
        names = set(backward(decoder, z_q, excerpt, losses, discriminator, learns, False))
        return names, decoder.weight.grad.clone()

    names, alone = step(None, False)
    assert names == {"mel", "notes", "wave", "buzz"}
    names, discriminatord = step(discriminator, False)
    assert names == {"mel", "notes", "wave", "buzz", "adversarial", "feature_matching"}
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    assert not torch.allclose(discriminatord, alone)
    names, while_learning = step(discriminator, True)
    assert "discriminator" in names
    assert all(parameter.grad is not None for parameter in discriminator.parameters())
    torch.testing.assert_close(while_learning, discriminatord)


def test_an_update_takes_the_mean_of_two_replicas_and_nothing_that_is_not_finite():
    from codec_loop import share, update

    module = torch.nn.utils.weight_norm(torch.nn.Conv1d(2, 2, 3))
    replica = share(torch.nn.utils.weight_norm(torch.nn.Conv1d(2, 2, 3)), module)
    ours, theirs = list(module.parameters()), list(replica.parameters())
    optimizer = torch.optim.SGD(ours, lr=0.1)
    before = [parameter.clone() for parameter in ours]
    for a, b in zip(ours, theirs, strict=True):
        a.grad, b.grad = torch.full_like(a, 0.1), torch.full_like(b, 0.3)
    assert update(optimizer, [module, replica])[1]
    for old, new in zip(before, ours, strict=True):
        torch.testing.assert_close(new, old - 0.02)
    x = torch.randn(1, 2, 5)
    torch.testing.assert_close(replica(x), module(x))
    before = [parameter.clone() for parameter in ours]
    ours[0].grad[:] = torch.nan
    assert not update(optimizer, [module, replica])[1]
    assert all(torch.equal(a, b) for a, b in zip(before, ours, strict=True))


@pytest.fixture
def tiny_dac():
    from codec_model import build

    torch.manual_seed(0)
    return build()


def test_losses_of_the_waveform_reach_the_first_codebooks_unless_kept_apart(tiny_dac):
    from codec_model import SPECTRAL, quantise

    z = torch.randn(1, 192, 6)
    first = tiny_dac.quantizer.quantizers[0].out_proj.bias
    last = tiny_dac.quantizer.quantizers[SPECTRAL].out_proj.bias
    for apart in (True, False):
        total, spectral, codes, latents, _ = quantise(tiny_dac, z, torch.tensor([16]), apart)
        assert codes.shape == (1, 16, 6)
        assert latents.shape == (1, 16 * 8, 6)
        gradients = torch.autograd.grad(total.sum(), (first, last), allow_unused=True)
        assert [g is not None for g in gradients] == [not apart, True]
    # The dropped codebooks are not in the sum.
    total, spectral, *_ = quantise(tiny_dac, z, torch.tensor([SPECTRAL]), apart=False)
    torch.testing.assert_close(total, spectral)


def test_the_encoder_learns_from_what_it_told_and_not_from_tokens_that_do_not_fit(tiny_dac):
    from codec_data import MARGIN, Excerpt
    from codec_losses import Losses
    from codec_model import HOP, SPECTRAL, EMACodebooks
    from tune_codec import backward

    frames = 2 * MARGIN + 8
    books, losses = EMACodebooks(tiny_dac), Losses(notes=3.0, wave=0.3, buzz=0.5, adversarial=0)
    music = 0.1 * torch.randn(1, 1, frames * HOP)
    excerpt = Excerpt(music, torch.zeros(1, 16, frames, dtype=torch.int64), torch.ones(frames))
    encoder, decoder = tiny_dac.encoder.block[0].bias, tiny_dac.decoder.model[0].bias
    first = tiny_dac.quantizer.quantizers[0].out_proj.bias

    def step(side, same):
        use, rng = books.log_shares(SPECTRAL), np.random.default_rng(1)
        result = backward(tiny_dac, side, excerpt, rng, losses, same, use, False)
        learnt = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in (encoder, decoder)]
        return result, learnt

    result, learnt = step("own", 0.0)
    assert learnt == [True, True]
    assert first.grad.abs().sum() > 0  # the waveform's losses reach the first codebooks
    assert set(result.losses) == {"mel", "notes", "wave", "buzz", "commit"}
    assert result.codes.shape == (1, 16, frames)
    alone = encoder.grad.clone()
    result, _ = step("own", 0.1)
    assert {"same", "equal"} < set(result.losses)
    assert not torch.allclose(encoder.grad, alone)
    for side in ("varied", "jumbled"):
        result, learnt = step(side, 0.1)
        assert learnt == [False, True]
        assert result.codes is None


def test_of_a_variation_the_kept_frames_have_the_tokens_of_the_codec_as_it_is_now(tiny_dac):
    from codec_data import Excerpt
    from codec_model import HOP
    from tune_codec import unfit

    music = 0.1 * torch.randn(1, 1, 10 * HOP)
    kept = torch.tensor([1.0, 0.0] * 5)
    varied = torch.full((1, 16, 10), 7)
    excerpt = unfit(tiny_dac, "varied", Excerpt(music, varied, kept), np.random.default_rng(0))
    with torch.no_grad():
        own = tiny_dac.quantizer(tiny_dac.encoder(music))[1]
    assert torch.equal(excerpt.tokens[..., ::2], own[..., ::2])
    assert (excerpt.tokens[..., 1::2] == 7).all()


def test_models_that_adopt_a_codec_change_nothing_but_their_codes(
    tmp_path, monkeypatch, small_codec
):
    from adopt_codec import main
    from small_models import random_model

    import vampnet_jax as vampnet

    tensors = {
        name: tensor * 1.1 if "codebook" in name else tensor
        for name, tensor in small_codec.tensors.items()
    }
    tuned = codec_bridge.Codec("dac", small_codec.config, tensors)
    vampnet.save(random_model(small_codec), tmp_path / "model")
    codec_bridge.save(tuned, tmp_path / "codec.safetensors")
    options = {"model": "model", "codec": "codec.safetensors", "out": "out"}
    words = [word for name, file in options.items() for word in (f"--{name}", str(tmp_path / file))]
    monkeypatch.setattr(sys, "argv", ["adopt_codec.py", *words])
    main()
    old, new = vampnet.load(tmp_path / "model"), vampnet.load(tmp_path / "out")
    assert new.codec.fingerprint == tuned.fingerprint
    for before, after in ((old.coarse, new.coarse), (old.fine, new.fine)):
        codes = tuned.codebooks[: len(before.params["embedding"]["codebooks"])]
        wanted = before.params | {"embedding": before.params["embedding"] | {"codebooks": codes}}
        jax.tree.map(np.testing.assert_array_equal, after.params, wanted)
        assert after.config == before.config
    assert new.coarse_sampling == old.coarse_sampling
    assert (new.coarse_window, new.fine_window) == (old.coarse_window, old.fine_window)


def test_what_is_random_in_a_step_is_drawn_from_streams_of_its_own():
    from codec_loop import generators

    draws = [rng.random() for step in (0, 1) for rng in generators(3, step, 3)]
    assert len(set(draws)) == 6
    assert draws[3:] == [rng.random() for rng in generators(3, 1, 3)]
    assert np.random.default_rng((3, 1)).random() not in draws


def test_an_interrupted_training_ends_with_the_weights_of_an_uninterrupted_one(
    tmp_path, monkeypatch, capsys
):
    import codec_loop

    monkeypatch.setattr(codec_loop, "export", lambda ema, out: None)
    monkeypatch.setattr(codec_loop.Run, "validate", lambda self: 0.0)
    monkeypatch.setattr(codec_loop, "LOG_EVERY", 6)
    monkeypatch.setattr(codec_loop, "SAVE_EVERY", 0.0)

    def train(out, stop=None):
        torch.manual_seed(0)
        module = torch.nn.Linear(3, 1)
        optimizer = torch.optim.AdamW(module.parameters())
        run = codec_loop.Run(
            out, module, optimizer, None, lambda: {"model": module.state_dict()},
            minutes=1e9, steps=6, learning_rate=0.1,
        )  # fmt: skip
        if state := run.resume():
            module.load_state_dict(state["model"])
        for step in run.steps():
            if step == stop:
                return None
            rng = codec_loop.generators(0, step, 1)[0]
            optimizer.zero_grad()
            module(torch.from_numpy(rng.random((4, 3), np.float32))).square().mean().backward()
            codec_loop.update(optimizer, [module])
            run.note("step", step)
        return module.state_dict(), run.ema

    whole = train(tmp_path / "whole")
    assert "step 6 minute 0.0 step 2.500" in capsys.readouterr().out
    assert train(tmp_path / "parts", stop=3) is None
    parts = train(tmp_path / "parts")
    out = capsys.readouterr().out
    assert "resumed at step 3" in out
    assert "step 6 minute 0.0 step 4.000" in out  # the mean of what was noted since
    for ours, theirs in zip(parts, whole, strict=True):
        for name in theirs:
            assert torch.equal(ours[name], theirs[name])
    assert not torch.equal(whole[0]["weight"], whole[1]["weight"])  # averaged


def test_centred_codes_tell_the_decoder_what_they_told_it(tiny_dac):
    from codec_model import SPECTRAL, EMACodebooks, quantise

    z = torch.randn(2, 192, 40)
    books = EMACodebooks(tiny_dac)
    before = quantise(tiny_dac, z, torch.full((2,), 16))
    books.update(before.codes, before.latents)
    assert (books.uses.sum(1) > 0).all()
    out_proj = tiny_dac.quantizer.quantizers[0].out_proj

    def told():
        return out_proj(books.codes[0][before.codes[:, 0]].transpose(1, 2))

    as_it_was = told()
    means = [books.sums[c].sum(0) / books.uses[c].sum() for c in range(SPECTRAL)]
    biases = [q.in_proj.bias.detach().clone() for q in tiny_dac.quantizer.quantizers]
    books.centre(tiny_dac, SPECTRAL)
    torch.testing.assert_close(told(), as_it_was, rtol=1e-4, atol=1e-5)
    for c, mean in enumerate(means):
        torch.testing.assert_close(books.sums[c].sum(0), torch.zeros(8), atol=1e-4, rtol=0)
        in_proj = tiny_dac.quantizer.quantizers[c].in_proj
        torch.testing.assert_close(in_proj.bias, biases[c] - mean, rtol=1e-4, atol=1e-5)


def test_dead_codes_are_replaced_by_what_the_encoder_gave_of_late(tiny_dac):
    from codec_model import EMACodebooks

    books = EMACodebooks(tiny_dac)
    tokens = torch.arange(64).repeat(16, 1)[None]  # only the first 64 codes are used
    latents = torch.randn(1, 16 * 8, 64)
    books.update(tokens, latents)
    torch.testing.assert_close(books.codes[3][:64], latents[0, 24:32].T, rtol=1e-4, atol=1e-5)
    untouched = books.codes[3][64:128].clone()
    books.reseed(torch.Generator().manual_seed(0))
    found = (books.codes[3][64:128, None] == latents[0, 24:32].T[None]).all(-1).any(1)
    assert found.all()
    assert not torch.equal(untouched, books.codes[3][64:128])


def test_fitted_codes_are_the_means_of_what_they_stood_for(tiny_dac):
    from codec_model import codebooks, fit_codes

    z = torch.randn(3000, 192) * torch.linspace(0.1, 2, 192)
    first = tiny_dac.quantizer.quantizers[0]
    with torch.no_grad():
        latents = first.in_proj(z.T[None])[0].T
        tokens = tiny_dac.quantizer(z.T[None])[1][0]
    old = torch.from_numpy(codebooks(tiny_dac).copy())
    uses = fit_codes(tiny_dac, z, iterations=0)
    assert torch.equal(uses.sum(1), torch.full((16,), 3000))
    assert torch.equal(uses[0], torch.bincount(tokens[0], minlength=1024))
    assert np.array_equal(codebooks(tiny_dac), old)
    fit_codes(tiny_dac, z, iterations=1)
    for code in range(1024):
        chosen = latents[tokens[0] == code]
        wanted = chosen.mean(0) if len(chosen) else old[0, code]
        torch.testing.assert_close(first.codebook.weight[code], wanted)
    assert (codebooks(tiny_dac) != old.numpy()).any(axis=(1, 2)).all()


def test_running_means_begin_with_the_fitted_codes(tiny_dac, monkeypatch, capsys):
    import tune_codec
    from codec_model import HOP, EMACodebooks

    class Noise:
        def draw(self, rng, n, samples, spread):
            assert (n, samples) == (1, 10 * HOP)
            return torch.from_numpy(rng.standard_normal((1, 1, samples), np.float32))

    monkeypatch.setattr(tune_codec, "FIT_EXCERPTS", 6)
    books = EMACodebooks(tiny_dac)
    before = books.codes[0].clone()
    tune_codec.fit(tiny_dac, books, Noise(), frames=10)
    assert not torch.equal(books.codes[0], before)
    torch.testing.assert_close(books.uses.sum(1), torch.full((16,), 10 + 0.002 * 1024))
    torch.testing.assert_close(books.sums / books.uses[..., None], torch.stack(books.codes))
    printed = re.findall(r"(\d+) → (\d+)", capsys.readouterr().out)
    assert len(printed) == 4
    assert all(1 <= int(old) <= 60 and 1 <= int(new) <= 60 for old, new in printed)


def test_tokens_of_the_same_music_are_found_nearer_than_those_of_other_music(tiny_dac):
    from codec_losses import swapped_prediction
    from codec_model import SPECTRAL, EMACodebooks, quantise

    z = 3 * torch.randn(2, 192, 30)
    codes = quantise(tiny_dac, z, torch.full((2,), 16)).codes[:, :SPECTRAL]
    use = EMACodebooks(tiny_dac).log_shares(SPECTRAL)
    same = swapped_prediction(tiny_dac, z, codes, use)
    assert same < swapped_prediction(tiny_dac, z, codes.flip(0), use) - 1
    # What everything has in common is worth less.
    common = use.scatter(1, codes[:1].transpose(0, 1).flatten(1), 0.0)
    assert swapped_prediction(tiny_dac, z[:1], codes[:1], common) > swapped_prediction(
        tiny_dac, z[:1], codes[:1], use
    )


def test_the_waveforms_error_counts_only_what_was_kept():
    from codec_losses import wave_error

    music = torch.randn(2, 1, 100)
    silence = torch.zeros_like(music)
    torch.testing.assert_close(wave_error(silence, music), torch.ones(2), rtol=1e-3, atol=0)
    half = torch.cat([music[..., :50], silence[..., 50:]], -1)
    kept = (torch.arange(100) < 50).float()
    assert (wave_error(half, music, kept) < 1e-6).all()
    assert (wave_error(half, music, 1 - kept) > 0.9).all()


def test_a_codec_is_read_back_as_it_was_exported(tmp_path, tiny_dac):
    from codec_model import build, codebooks, export, read_codec

    export(tiny_dac.state_dict(), tmp_path)
    audio = 0.1 * torch.randn(1, 1, 4 * 960)
    for name, tolerance in (("codec.pth", 1e-6), ("codec.safetensors", 2e-2)):
        again = build()
        again.load_state_dict(read_codec(tmp_path / name))
        with torch.no_grad():
            expected = tiny_dac.encoder(audio)
            pairs = [(again.encoder(audio), expected)]
            pairs += [(again.decoder(expected), tiny_dac.decoder(expected))]
            pairs += [tuple(torch.from_numpy(codebooks(dac)) for dac in (again, tiny_dac))]
        for found, wanted in pairs:
            assert (found - wanted).abs().max() < tolerance * wanted.abs().max()
