"""Encoding and decoding: shapes, chunks, batches, hand-over, bad input."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_codecs import SMALL, random_codec

import codec_bridge
from codec_bridge import InputError
from codec_bridge.codec import _to_jax, _to_torch
from codec_bridge.config import CodecConfig
from codec_bridge.receptive_field import Convolution, inputs_needed, output_length

ODD = {"encoder_rates": (3, 5), "decoder_rates": (5, 3)}
CASES = [("dac", {}), ("lac", {}), ("dac", ODD), ("lac", ODD), ("lac", {"codebook_dim": 5})]


def noise(rows, samples, seed=0):
    rng = np.random.default_rng(seed)
    return (0.3 * rng.standard_normal((rows, samples))).astype(np.float32)


def margins(codec, audio):
    """By how much each chosen row beat the second best, as cosine: [B, C, T]."""
    padding = -audio.shape[1] % codec.hop_length
    padded = torch.from_numpy(np.pad(audio, ((0, 0), (0, padding))))[:, None]
    residual, found = codec._network.encoder(padded), []
    for stage in codec._network.quantizer.quantizers:
        direction = torch.nn.functional.normalize(stage.in_proj(residual).transpose(1, 2), dim=-1)
        cosines = direction @ torch.nn.functional.normalize(stage.codebook.weight, dim=-1).T
        best = cosines.topk(2, dim=-1)
        found.append((best.values[..., 0] - best.values[..., 1]).numpy())
        rows = stage.codebook(best.indices[..., 0]).transpose(1, 2)
        residual = residual - stage.out_proj(rows)
    return np.stack(found, 1)


def assert_same_tokens(codec, audio, tokens, others):
    """Equal up to decisions closer than 1e-4; those change the stages after them too."""
    tokens, others = np.asarray(tokens), np.asarray(others)
    assert tokens.shape == others.shape
    for b, t in np.argwhere((tokens != others).any(1)):
        stage = int((tokens[b, :, t] != others[b, :, t]).argmax())
        assert margins(codec, audio)[b, stage, t] < 1e-4


@pytest.mark.parametrize(("kind", "sizes"), CASES)
def test_tokens_and_audio_do_not_depend_on_the_chunk_size(kind, sizes):
    codec = random_codec(kind, **sizes)
    audio = noise(2, 3517)
    tokens = codec.encode(audio, chunk_seconds=100)
    sound = codec.decode(tokens, chunk_seconds=100)
    assert len(np.unique(tokens)) > 20
    assert np.std(sound) > 0.01
    # From one frame at a time to more than half of it.
    for seconds in (0.05, 0.11, 0.27) if sizes else (0.005, 0.09, 0.27):
        assert_same_tokens(codec, audio, tokens, codec.encode(audio, chunk_seconds=seconds))
        again = codec.decode(tokens, chunk_seconds=seconds)
        np.testing.assert_allclose(again, sound, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("kind", "sizes"), CASES)
def test_shapes(kind, sizes):
    codec = random_codec(kind, **sizes)
    hop = codec.hop_length
    for samples in (2 * hop, 2 * hop + 1, 7 * hop - 1):
        tokens = codec.encode(noise(2, samples))
        frames = -(-samples // hop)
        if (kind, sizes) == ("lac", ODD):
            frames -= 1  # its convolutions lose one
        assert tokens.shape == (2, 8, frames)
        assert tokens.dtype == jnp.int32
        assert isinstance(tokens, jax.Array)
        sound = codec.decode(tokens)
        assert sound.shape == (2, frames * hop)
        assert sound.dtype == jnp.float32


def test_decoding_with_odd_strides_ends_in_zeros_in_place_of_missing_samples():
    codec = random_codec("dac", **ODD)
    sound = np.asarray(codec.decode(codec.encode(noise(1, 600))))
    # Strides 5 and 3: one sample short at the first, so 3 + 1 at the second.
    assert (sound[0, -4:] == 0).all()
    assert (sound[0, -8:-4] != 0).all()


@pytest.mark.parametrize("kind", ["dac", "lac"])
def test_rows_of_a_batch_do_not_influence_each_other(kind):
    codec = random_codec(kind)
    audio = noise(5, 1000)
    tokens = codec.encode(audio)
    for row in range(5):
        alone = codec.encode(audio[row : row + 1])
        assert_same_tokens(codec, audio[row : row + 1], alone, tokens[row : row + 1])
    few = codec.decode(tokens, chunk_seconds=0.3)  # two rows at a time
    np.testing.assert_allclose(few, codec.decode(tokens, chunk_seconds=0.1), atol=1e-5)


def test_memory_is_bounded_by_the_chunk_for_long_audio_and_many_rows():
    codec = random_codec("dac")
    seen = []
    hook = codec._network.encoder.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].numel())
    )
    context = 1130 + 3 * codec.hop_length  # receptive field, aligned to frames
    codec.encode(noise(1, 16_000), chunk_seconds=0.5)
    codec.encode(noise(40, 800), chunk_seconds=0.5)
    hook.remove()
    assert max(seen) <= 4000 + context
    assert len(seen) >= 4 + 8


def test_progress_counts_the_frames_of_all_rows():
    codec = random_codec("dac")
    for run in (
        lambda report: codec.encode(noise(2, 1280), chunk_seconds=0.08, progress=report),
        lambda report: codec.decode(np.zeros((2, 8, 20), int), chunk_seconds=0.08, progress=report),
    ):
        steps = []
        run(lambda done, total, steps=steps: steps.append((done, total)))
        assert steps == [(10, 40), (20, 40), (30, 40), (40, 40)]


def test_fewer_codebooks_decode_as_a_prefix_of_the_residual_quantiser():
    codec = random_codec("dac")
    tokens = np.asarray(codec.encode(noise(1, 1000)))
    coarse = np.asarray(codec.decode(tokens[:, :2]))
    assert coarse.shape == np.asarray(codec.decode(tokens)).shape
    with torch.no_grad():
        latents = codec._network.quantizer.from_codes(torch.tensor(tokens[:, :2]).long())[0]
        expected = codec._network.decoder(latents)[:, 0].numpy()
    np.testing.assert_allclose(coarse, expected, atol=1e-6)


def test_attributes(small_codec):
    assert small_codec.kind == "dac"
    assert small_codec.sample_rate == 8000
    assert small_codec.hop_length == 64
    assert small_codec.frame_rate == 125.0
    assert small_codec.n_codebooks == 8
    assert small_codec.codebook_size == 64
    assert small_codec.codebooks.shape == (8, 64, 8)
    assert small_codec.codebooks.dtype == np.float32
    rows = small_codec.tensors["quantizer.quantizers.3.codebook.weight"]
    np.testing.assert_array_equal(small_codec.codebooks[3], rows)


def test_the_fingerprint_tells_weights_apart():
    codec = random_codec("dac")
    assert codec.fingerprint == random_codec("dac").fingerprint
    assert codec.fingerprint != random_codec("dac", seed=1).fingerprint
    assert len(bytes.fromhex(codec.fingerprint)) == 32
    tensors = dict(reversed(codec.tensors.items()))
    same = codec_bridge.Codec("dac", codec.config, tensors)
    assert same.fingerprint == codec.fingerprint


def test_arrays_pass_between_torch_and_jax_without_copies():
    tensor = torch.arange(600, dtype=torch.float32).reshape(3, 200)
    array = _to_jax(tensor)
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    assert _to_torch(array).data_ptr() == tensor.data_ptr()
    samples = np.ones((2, 100), np.float32)
    assert _to_torch(samples).data_ptr() == samples.ctypes.data
    samples.flags.writeable = False  # NumPy 2.0 would not export it
    assert _to_torch(samples).data_ptr() != samples.ctypes.data


def test_cudnn_stays_on_and_computes_in_full_float32(small_codec):
    seen = []

    def look(*_):
        seen.append((torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32))

    small_codec.decode(small_codec.encode(noise(1, 640), progress=look), progress=look)
    assert seen == [(True, False)] * 2


def test_audio_may_be_numpy_or_jax_of_any_float_type(small_codec):
    audio = noise(1, 640)
    tokens = small_codec.encode(audio)
    np.testing.assert_array_equal(small_codec.encode(jnp.asarray(audio)), tokens)
    np.testing.assert_array_equal(small_codec.encode(audio.astype(np.float64)), tokens)
    np.testing.assert_array_equal(small_codec.encode(np.asfortranarray(audio)), tokens)
    sharded = jax.device_put(
        np.repeat(audio, 2, 0),
        jax.NamedSharding(jax.make_mesh((2,), ("batch",)), jax.P("batch")),
    )
    np.testing.assert_array_equal(small_codec.encode(sharded)[:1], tokens)


def test_no_rows_and_no_frames_give_empty_results(small_codec):
    assert small_codec.encode(np.zeros((0, 640), np.float32)).shape == (0, 8, 10)
    assert small_codec.decode(np.zeros((0, 8, 10), np.int32)).shape == (0, 640)
    assert small_codec.decode(np.zeros((2, 8, 0), np.int32)).shape == (2, 0)


@pytest.mark.parametrize(
    ("audio", "says"),
    [
        (np.zeros(100, np.float32), "shape"),
        (np.zeros((1, 0), np.float32), "no samples"),
        (np.zeros((1, 100), np.int16), "int16"),
        (np.full((1, 100), np.nan, np.float32), "not finite"),
    ],
)
def test_bad_audio_is_refused(small_codec, audio, says):
    with pytest.raises(InputError, match=says):
        small_codec.encode(audio)


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        (np.zeros((8, 10), int), "shape"),
        (np.zeros((1, 9, 10), int), "1 to 8 codebooks"),
        (np.zeros((1, 8, 10)), "integers"),
        (np.full((1, 8, 10), 64), "masked"),
        (np.full((1, 8, 10), -1), "-1"),
        (np.full((1, 8, 10), 2**32), "4294967296"),
    ],
)
def test_bad_tokens_are_refused(small_codec, tokens, says):
    with pytest.raises(InputError, match=says):
        small_codec.decode(tokens)


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_a_chunk_must_last(small_codec, seconds):
    with pytest.raises(InputError, match="chunk_seconds"):
        small_codec.encode(noise(1, 640), chunk_seconds=seconds)


def test_unknown_devices_are_refused():
    tensors = random_codec("dac").tensors
    config = CodecConfig.from_kwargs(SMALL)
    with pytest.raises(InputError, match="abacus"):
        codec_bridge.Codec("dac", config, tensors, device="abacus")
    if not torch.cuda.is_available():
        codec = codec_bridge.Codec("dac", config, tensors, device="cuda")
        with pytest.raises(InputError, match="cuda"):
            codec.encode(noise(1, 640))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"encoder_rates": (2, 4)}, "same product"),
        ({"encoder_rates": ()}, "encoder_rates"),
        ({"encoder_rates": 64}, "encoder_rates"),
        ({"encoder_rates": (64,) * 11}, "encoder_rates"),
        ({"n_codebooks": 0}, "n_codebooks"),
        ({"n_codebooks": True}, "n_codebooks"),
        ({"codebook_size": 10**9}, "codebook_size"),
        ({"codebook_dim": [8, 4]}, "codebook_dim"),
        ({"sample_rate": None}, "lacks sample_rate"),
        ({"decoder_dim": 36}, "halved"),
    ],
)
def test_absurd_configurations_are_refused(change, says):
    with pytest.raises(InputError, match=says):
        CodecConfig.from_kwargs({**SMALL, **change})


convolutions = st.builds(
    Convolution,
    kernel=st.integers(1, 7),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 3),
    padding=st.integers(0, 3),
    transposed=st.booleans(),
)


@given(st.lists(convolutions, min_size=1, max_size=3), st.integers(8, 20))
def test_inputs_needed_are_those_that_outputs_depend_on(chain, length):
    signal = torch.zeros(1, 1, length, dtype=torch.float64).requires_grad_()
    out = signal
    for c in chain:
        run = torch.conv_transpose1d if c.transposed else torch.conv1d
        if output_length([c], out.shape[-1]) == 0:
            return
        weight = torch.ones(1, 1, c.kernel, dtype=torch.float64)
        out = run(out, weight, stride=c.stride, padding=c.padding, dilation=c.dilation)
    assert output_length(chain, length) == out.shape[-1]
    for start, stop in itertools.product((0, out.shape[-1] // 2), (out.shape[-1],)):
        if start == stop:
            continue
        (gradient,) = torch.autograd.grad(out[..., start:stop].sum(), signal, retain_graph=True)
        used = np.flatnonzero(gradient[0, 0])
        first, last = inputs_needed(chain, start, stop)
        if len(used):
            assert first <= used[0]
            assert used[-1] < last
