"""Token and mask files come back as they were written; others are refused before they do harm."""

import io
import types
import zipfile

import numpy as np
import pytest

from codec_bridge.errors import InputError
from vampnet_jax import tokens

CODEC = types.SimpleNamespace(
    fingerprint="ab" * 32, sample_rate=8000, hop_length=64, codebook_size=64
)
CLIP = tokens.TokenFile(
    np.arange(2 * 3 * 10, dtype=np.int32).reshape(2, 3, 10), "ab" * 32, 8000, 64, 630, -6.5
)


def fields(**changes) -> dict:
    values = {
        "format_version": 1,
        "tokens": CLIP.tokens,
        "codec_fingerprint": "ab" * 32,
        "sample_rate": 8000,
        "hop_length": 64,
        **changes,
    }
    return {name: value for name, value in values.items() if value is not None}


def test_round_trip(tmp_path):
    tokens.write(tmp_path / "a.npz", CLIP)
    again = tokens.read(tmp_path / "a.npz")
    np.testing.assert_array_equal(again.tokens, CLIP.tokens)
    assert again.tokens.dtype == np.int32
    assert (again.codec_fingerprint, again.sample_rate, again.hop_length) == ("ab" * 32, 8000, 64)
    assert (again.n_samples, again.gain_db) == (630, -6.5)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    again.check("a.npz", CODEC, 3)


@pytest.mark.parametrize("dtype", [np.uint16, np.int64, np.uint8])
def test_plain_files_of_others_are_read(tmp_path, dtype):
    np.savez(tmp_path / "a.npz", **fields(tokens=CLIP.tokens[0].astype(dtype)))
    again = tokens.read(tmp_path / "a.npz")
    np.testing.assert_array_equal(again.tokens, CLIP.tokens[:1])
    assert (again.n_samples, again.gain_db) == (640, 0.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens": None}, "has no 'tokens'"),
        ({"codec_fingerprint": None}, "has no 'codec_fingerprint'"),
        ({"format_version": 2}, "format 2"),
        ({"tokens": CLIP.tokens.astype(float)}, "float64"),
        ({"tokens": CLIP.tokens[0, 0]}, r"shape \(10,\)"),
        ({"tokens": CLIP.tokens[..., :0]}, r"shape \(2, 3, 0\)"),
        ({"tokens": CLIP.tokens - 1}, "from -1 to 58"),
        ({"tokens": CLIP.tokens.astype(np.int64) << 40}, "no codec has"),
        ({"tokens": np.zeros((65, 1, 4), int)}, "65 channels"),
        ({"n_samples": 641}, "impossible length"),
        ({"n_samples": 0}, "impossible length"),
        ({"sample_rate": 0}, "impossible"),
        ({"gain_db": np.nan}, "impossible"),
        ({"hop_length": "sixty"}, "wrong type"),
        ({"sample_rate": [8000, 8000]}, "wrong type"),
    ],
)
def test_implausible_contents_are_refused(tmp_path, changes, words):
    np.savez(tmp_path / "a.npz", **fields(**changes))
    with pytest.raises(InputError, match=words):
        tokens.read(tmp_path / "a.npz")


def test_no_token_file_at_all(tmp_path):
    with pytest.raises(InputError, match="no file"):
        tokens.read(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("not a zip file")
    with pytest.raises(InputError, match="not a token file"):
        tokens.read(tmp_path / "text.npz")
    tokens.write(tmp_path / "a.npz", CLIP)
    whole = (tmp_path / "a.npz").read_bytes()
    for length in (10, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.npz").write_bytes(whole[:length])
        with pytest.raises(InputError, match="not a token file"):
            tokens.read(tmp_path / "cut.npz")
    for position in range(30, len(whole), 97):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        (tmp_path / "damaged.npz").write_bytes(damaged)
        try:
            tokens.read(tmp_path / "damaged.npz")
        except InputError:
            continue  # anything but InputError or a readable file fails this test


def test_pickles_are_never_loaded(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was loaded",))

    np.savez(tmp_path / "a.npz", **fields(gain_db=np.array(Harmful(), object)))
    with pytest.raises(InputError):
        tokens.read(tmp_path / "a.npz")


def with_array(path, data: bytes) -> None:
    np.savez(path, **fields(tokens=None))
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tokens.npy", data)


def test_sizes_are_checked_before_anything_is_unpacked(tmp_path):
    with_array(tmp_path / "bomb.npz", bytes(tokens.MAX_BYTES + 1))
    assert (tmp_path / "bomb.npz").stat().st_size < 2**20
    with pytest.raises(InputError, match="more than 256 MiB"):
        tokens.read(tmp_path / "bomb.npz")


def test_a_header_that_claims_terabytes_is_refused(tmp_path):
    header = io.BytesIO()
    claim = {"descr": "<i4", "fortran_order": False, "shape": (1, 4, 10**12)}
    np.lib.format.write_array_header_1_0(header, claim)
    with_array(tmp_path / "a.npz", header.getvalue() + bytes(64))
    with pytest.raises(InputError, match="not a token file"):
        tokens.read(tmp_path / "a.npz")


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_only_what_numpy_writes_is_unpacked(tmp_path, method):
    """A flipped bit in such an entry raises what no reader of .npz expects."""
    np.savez(tmp_path / "plain.npz", **fields())
    with zipfile.ZipFile(tmp_path / "plain.npz") as plain:
        entries = {name: plain.read(name) for name in plain.namelist()}
    with zipfile.ZipFile(tmp_path / "a.npz", "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    with pytest.raises(InputError, match="not a token file"):
        tokens.read(tmp_path / "a.npz")


def test_tokens_of_another_codec_are_refused():
    with pytest.raises(InputError, match="another codec"):
        CLIP.check("a.npz", types.SimpleNamespace(**vars(CODEC) | {"fingerprint": "cd" * 32}), 3)
    with pytest.raises(InputError, match="16000 Hz"):
        CLIP.check("a.npz", types.SimpleNamespace(**vars(CODEC) | {"sample_rate": 16_000}), 3)
    with pytest.raises(InputError, match="3 codebooks; the model needs 4"):
        CLIP.check("a.npz", CODEC, 4)
    with pytest.raises(InputError, match="token 59"):
        CLIP.check("a.npz", types.SimpleNamespace(**vars(CODEC) | {"codebook_size": 59}), 3)


@pytest.mark.parametrize("shape", [(10,), (3, 10), (1, 3, 10)])
@pytest.mark.parametrize("dtype", [bool, np.int8, np.int64])
def test_masks_of_every_accepted_shape(tmp_path, shape, dtype):
    mask = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    np.save(tmp_path / "m.npy", mask)
    got = tokens.read_mask(tmp_path / "m.npy", 3, 10)
    assert got.dtype == bool
    np.testing.assert_array_equal(got, np.broadcast_to(mask.astype(bool), (1, 3, 10))[0])


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (np.zeros((3, 11), bool), r"shape \(3, 11\); this clip needs \(3, 10\)"),
        (np.zeros((10, 3), bool), "shape"),
        (np.zeros((2, 3, 10), bool), "shape"),
        (np.zeros((3, 10)), "booleans"),
        (np.full((3, 10), 2), "other than 0"),
        (np.array(["a"] * 10), "booleans"),
        (np.array([None] * 10), r"not a \.npy"),
    ],
)
def test_masks_that_do_not_fit_are_refused(tmp_path, mask, words):
    np.save(tmp_path / "m.npy", mask)
    with pytest.raises(InputError, match=words):
        tokens.read_mask(tmp_path / "m.npy", 3, 10)


def test_mask_files_that_are_none(tmp_path):
    with pytest.raises(InputError, match="no mask"):
        tokens.read_mask(tmp_path / "none.npy", 3, 10)
    (tmp_path / "text.npy").write_text("0 1 0 1")
    with pytest.raises(InputError, match=r"not a \.npy"):
        tokens.read_mask(tmp_path / "text.npy", 3, 10)


@pytest.mark.parametrize("shape", ["-" * 9000 + "1,", f"{10**26},", f"{10**12},"])
def test_headers_of_masks_are_not_believed(tmp_path, shape):
    text = f"{{'descr': '|b1', 'fortran_order': False, 'shape': ({shape}), }}".encode()
    header = b"\x93NUMPY\x02\x00" + len(text).to_bytes(4, "little") + text
    (tmp_path / "m.npy").write_bytes(header + bytes(30))
    with pytest.raises(InputError, match=r"not a \.npy"):
        tokens.read_mask(tmp_path / "m.npy", 3, 10)
