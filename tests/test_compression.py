"""`.vnt` files: what goes in comes out, the size is what theory says, and nothing lies."""

import dataclasses
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_codecs import random_codec
from small_models import random_model

from codec_bridge.errors import InputError
from vampnet_jax.compression import container
from vampnet_jax.compression.coding import grid
from vampnet_jax.compression.compressor import Compressor
from vampnet_jax.compression.container import HEADER_BYTES
from vampnet_jax.compression.frequencies import load_frequencies, quantise, save_frequencies
from vampnet_jax.compression.range_coding import Decoder, Encoder, information
from vampnet_jax.compression.settings import compress_with, compress_within
from vampnet_jax.pipeline import Clip, decode

CODES, FRAMES, HOP = 64, 101, 64
FREQUENCIES = np.random.default_rng(0).gamma(0.5, size=(8, CODES))
TABLE = quantise(FREQUENCIES)


@pytest.fixture(scope="module")
def compressor() -> Compressor:
    return Compressor(random_model(random_codec()), TABLE)


def clip(n_frames: int = FRAMES, channels: int = 2, seed: int = 1) -> Clip:
    """Tokens drawn from the table."""
    rng = np.random.default_rng(seed)
    rows = [rng.choice(CODES, (channels, n_frames), p=row / row.sum()) for row in TABLE]
    tokens = np.stack(rows, axis=1).astype(np.int32)
    return Clip(tokens, n_frames * HOP - 3, gain_db=-3.21, loudness=-24.0)


def kept_information(made: Clip, keep: np.ndarray) -> float:
    pairs = zip(made.tokens.swapaxes(0, 1), keep, TABLE, strict=False)
    return sum(information(rows[:, chosen].ravel(), table) for rows, chosen, table in pairs)


@given(
    n=st.integers(0, 300),
    n_codes=st.integers(2, 80),
    seed=st.integers(0, 2**32 - 1),
    by_row=st.booleans(),
)
def test_coded_symbols_come_back_and_cost_what_they_inform(n, n_codes, seed, by_row):
    rng = np.random.default_rng(seed)
    frequencies = rng.integers(1, 5000, (n, n_codes) if by_row else n_codes)
    symbols = rng.integers(0, n_codes, n)
    encoder = Encoder()
    encoder.code(symbols, frequencies)
    payload = encoder.payload()
    np.testing.assert_array_equal(Decoder(payload).code(np.zeros(n), frequencies), symbols)
    assert 8 * len(payload) <= 1.001 * information(symbols, frequencies) + 64


def test_frequencies_become_counts_that_miss_no_code(compressor, tmp_path):
    counts = quantise(np.array([[0.0, 0.25, 0.75], [5.0, 0.0, 0.0]]))
    assert (counts.sum(axis=1) == 65536).all()
    assert counts.min() == 1
    assert abs(counts[0, 1] / 65536 - 0.25) < 1e-4
    codec = compressor.model.codec
    assert load_frequencies(tmp_path, codec, 8) is None
    save_frequencies(tmp_path, FREQUENCIES, codec.fingerprint)
    np.testing.assert_array_equal(load_frequencies(tmp_path, codec, 8), TABLE)
    save_frequencies(tmp_path, FREQUENCIES, "0" * 64)
    with pytest.raises(InputError, match="another codec"):
        load_frequencies(tmp_path, codec, 8)


@pytest.mark.parametrize(
    ("codebooks", "period", "with_model"),
    [(8, 1, False), (8, 1, True), (3, 4, False), (3, 4, True), (1, 200, False)],
)
def test_every_kept_token_comes_back(compressor, codebooks, period, with_model):
    source, keep = clip(), grid(codebooks, FRAMES, period)
    data = compressor.compress(source, keep, period=period, seed=7, with_model=with_model)
    content = compressor.read(data)
    np.testing.assert_array_equal(content.keep, keep)
    np.testing.assert_array_equal(content.tokens, np.where(keep, source.tokens[:, :codebooks], 0))
    header = content.header
    assert (header.seed, header.n_samples, header.loudness) == (7, source.n_samples, -24.0)
    assert header.gain_db == pytest.approx(-3.21)


def test_a_chosen_mask_comes_back(compressor):
    source, keep = clip(), np.random.default_rng(2).random((4, FRAMES)) < 0.1
    keep[1] = False
    content = compressor.read(compressor.compress(source, keep))
    np.testing.assert_array_equal(content.keep, keep)
    np.testing.assert_array_equal(content.tokens, np.where(keep, source.tokens[:, :4], 0))


def test_all_tokens_take_what_the_table_says(compressor):
    """Within 1 % and 64 bits of -sum log2 p; the header has 47 bytes."""
    source, keep = clip(1000), grid(8, 1000, 1)
    data = compressor.compress(source, keep, period=1)
    least = kept_information(source, keep)
    assert HEADER_BYTES <= 48
    assert least <= 8 * (len(data) - HEADER_BYTES) <= 1.01 * least + 64


def test_a_model_that_knows_its_music_needs_fewer_bits(compressor):
    """The head's bias makes one code of the coarse codebooks nearly sure."""
    model = compressor.model
    params, config = model.coarse
    bias = np.full(params["head"]["bias"].shape, -20.0, np.float32)
    bias[:, 5] = 0
    sure = {**params, "head": {"kernel": 0 * params["head"]["kernel"], "bias": bias}}
    coarse = model.coarse._replace(params=sure)
    knowing = Compressor(dataclasses.replace(model, coarse=coarse), TABLE)
    keep = grid(config.n_codebooks, FRAMES, 1)
    source = clip()
    source.tokens[:, : len(keep)] = 5
    data = knowing.compress(source, keep, period=1, with_model=True)
    np.testing.assert_array_equal(knowing.read(data).tokens, source.tokens[:, : len(keep)])
    n_tokens = 2 * keep.size
    # Each costs -log2 of 1 less the share of the uniform distribution: 0.02 bits.
    assert 8 * (len(data) - HEADER_BYTES) < 0.03 * n_tokens + 64


def test_what_was_kept_stays_and_the_seed_decides_the_rest(compressor):
    source, keep = clip(), grid(4, FRAMES, 3)
    data = compressor.compress(source, keep, period=3, seed=1)
    made = compressor.restore(compressor.read(data), steps=4)
    again = compressor.restore(compressor.read(data), steps=4)
    other = compressor.read(compressor.compress(source, keep, period=3, seed=2))
    np.testing.assert_array_equal(made.tokens[0][:, :4][:, keep], source.tokens[:, :4][:, keep])
    np.testing.assert_array_equal(made.tokens, again.tokens)
    assert (made.tokens != compressor.restore(other, steps=4).tokens).any()
    sound = decode(compressor.model, made, 0)
    assert sound.samples.shape == (2, source.n_samples)


@pytest.mark.parametrize("bitrate", [600.0, 2000.0, 9000.0])
def test_a_file_never_takes_more_than_its_bitrate(compressor, bitrate):
    source = clip(channels=1)
    made = compress_within(compressor, source, bitrate)
    seconds = source.n_samples / compressor.model.codec.sample_rate
    assert 8 * len(made.data) / seconds <= bitrate
    content = compressor.read(made.data)
    np.testing.assert_array_equal(content.keep, made.keep)
    if bitrate > 8000:  # everything fits
        assert made.keep.all()
        assert len(made.keep) == 8


def test_steps_that_are_asked_for_are_for_all_codebooks():
    model = random_model(random_codec())
    sampling = model.coarse_sampling.changed(codebook_steps=(2, 1))
    made = [
        Compressor(dataclasses.replace(model, coarse_sampling=how)).generate(
            clip(n_frames=12, channels=1), grid(1, 12, 4), seed=0, steps=3
        )
        for how in (sampling, model.coarse_sampling)
    ]
    np.testing.assert_array_equal(made[0].tokens, made[1].tokens)


def test_nothing_is_tried_that_another_setting_contains(compressor):
    stages = []
    compress_within(
        compressor, clip(channels=1), 9000.0, on_progress=lambda *done: stages.append(done)
    )
    assert stages == [("trials", 1, 1)]


def test_a_bitrate_below_the_header_is_refused(compressor):
    with pytest.raises(InputError, match="the header alone takes 47"):
        compress_within(compressor, clip(), 300.0)


def test_the_model_keeps_what_it_could_not_guess(compressor):
    """Where the coarse model is sure of code 5, the tokens that differ are kept first."""
    model = compressor.model
    params, _ = model.coarse
    bias = np.zeros(params["head"]["bias"].shape, np.float32)
    bias[:, 5] = 10
    sure = {**params, "head": {"kernel": 0 * params["head"]["kernel"], "bias": bias}}
    model = dataclasses.replace(model, coarse=model.coarse._replace(params=sure))
    source = clip(model.coarse_window, channels=1)
    source.tokens[:, :2] = 5
    source.tokens[0, 0, [3, 17]] = 9
    source.tokens[0, 1, 30] = 9
    made = compress_with(Compressor(model, TABLE), source, share=3 / (2 * model.coarse_window))
    assert set(zip(*np.nonzero(made.keep), strict=True)) == {(0, 3), (0, 17), (1, 30)}


def test_another_model_table_or_arithmetic_is_refused(compressor, monkeypatch):
    source, keep = clip(), grid(2, FRAMES, 1)
    data = compressor.compress(source, keep, period=1)
    for other in (
        Compressor(random_model(random_codec(), seed=5), TABLE),
        Compressor(random_model(random_codec(seed=5)), TABLE),
        Compressor(compressor.model),
    ):
        with pytest.raises(InputError, match=r"made with another (codec|model)"):
            other.read(data)
    with_model = compressor.compress(source, keep, period=1, with_model=True)
    monkeypatch.setattr(compressor.predictor, "fingerprint", lambda stage, n_frames: b"1234")
    with pytest.raises(InputError, match="rounds otherwise"):
        compressor.read(with_model)


def resealed(data: bytes) -> bytes:
    """The same bytes under a checksum that fits."""
    crc = zlib.crc32(data[HEADER_BYTES:], zlib.crc32(data[: HEADER_BYTES - 4]))
    return data[: HEADER_BYTES - 4] + struct.pack("<I", crc) + data[HEADER_BYTES:]


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Bits flipped, bytes cut off, added or overwritten."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        sort = rng.integers(4)
        at = int(rng.integers(len(changed))) if changed else 0
        if sort == 0 and changed:
            changed[at] ^= 1 << int(rng.integers(8))
        elif sort == 1:
            del changed[at:]
        elif sort == 2:
            changed[at:at] = rng.bytes(int(rng.integers(1, 40)))
        elif changed:
            field = int(rng.integers(HEADER_BYTES))  # lengths that lie
            changed[field : field + 4] = rng.bytes(4)
    return bytes(changed)


def test_10_000_damaged_files_give_an_error_or_a_valid_result(compressor):
    source = clip()
    keep = np.random.default_rng(3).random((4, FRAMES)) < 0.2
    files = [
        compressor.compress(source, grid(4, FRAMES, 2), period=2),
        compressor.compress(source, keep),
    ]
    rng = np.random.default_rng(4)
    read = 0
    for i in range(10_000):
        data = mutated(files[i % 2], rng)
        if i % 4 < 2 and len(data) >= HEADER_BYTES:
            data = resealed(data)
        try:
            content = compressor.read(data)
        except InputError:
            continue
        read += 1
        header = content.header
        assert content.tokens.shape == (header.channels, header.codebooks, header.n_frames)
        assert 0 <= content.tokens.min() <= content.tokens.max() < CODES
    assert 0 < read < 5000


def test_damaged_files_coded_under_the_model_give_an_error_or_a_valid_result(compressor):
    data = compressor.compress(clip(30), grid(4, 30, 1), period=1, with_model=True)
    wanted = compressor.read(data).tokens
    rng = np.random.default_rng(5)
    for _ in range(100):
        changed = bytearray(data)
        changed[int(rng.integers(HEADER_BYTES, len(data)))] ^= 1 << int(rng.integers(8))
        cut = len(data) - int(rng.integers(0, 2) * rng.integers(len(data) - HEADER_BYTES))
        try:
            content = compressor.read(resealed(bytes(changed[:cut])))
        except InputError:
            continue
        np.testing.assert_array_equal(content.tokens, wanted)


def test_lengths_that_lie_are_found_before_anything_is_allocated(compressor):
    data = bytearray(compressor.compress(clip(), grid(4, FRAMES, 1), period=1))
    data[32:35] = (2**22).to_bytes(3, "little")
    with pytest.raises(InputError, match=r"says that .* bytes hold 4194304 frames"):
        compressor.read(resealed(bytes(data)))
    frames = 1000 * len(data)
    data[32:35] = frames.to_bytes(3, "little")
    data[28:32] = (frames * HOP).to_bytes(4, "little")
    tracemalloc.start()
    with pytest.raises(InputError, match="more tokens than its size can hold"):
        compressor.read(resealed(bytes(data)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * frames  # bytes: less than the tokens that it claims to hold would take


def test_other_files_are_told_apart():
    with pytest.raises(InputError, match=r"not a \.vnt file"):
        container.unpack(b"RIFF" + bytes(60))
    with pytest.raises(InputError, match="has format 9"):
        container.unpack(b"VNT\x09" + bytes(60))


def test_the_bytes_are_those_that_the_documentation_lists():
    """Files must stay readable: neither the layout nor the coder's arithmetic may change."""
    header = container.Header(
        container.Probabilities.TABLE, 2, 4, 3, b"codec", b"weights", b"math", 0xA1B2C3D4,
        0x01020304, 0x0A0B0C, -1.25, float("nan"), 0x55667788,
    )  # fmt: skip
    data = container.pack(header, bytes(100_000))
    assert data[:8] == b"VNT\x01\x01\x02\x04\x03"
    assert data[8:24] == b"codecweightsmath"
    assert data[24:32] == bytes.fromhex("d4c3b2a1 04030201")
    assert data[32:39] == bytes.fromhex("0c0b0a 83ff 0080")
    assert data[39:43] == bytes.fromhex("88776655")
    assert data[43:47] == zlib.crc32(data[47:], zlib.crc32(data[:43])).to_bytes(4, "little")
    read, payload = container.unpack(data)
    assert dataclasses.replace(read, loudness=0.0) == dataclasses.replace(header, loudness=0.0)
    assert len(payload) == 100_000

    encoder = Encoder()
    encoder.code(np.array([0, 4, 4, 3, 2, 4, 1, 0]), np.array([1, 2, 3, 4, 90]))
    encoder.code(np.array([3, 1]), np.array([[5, 1, 1, 9], [1, 1, 1, 1]]))
    assert encoder.payload().hex() == "009d1395"
