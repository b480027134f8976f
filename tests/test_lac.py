"""LAC against vectors of the original VampNet's codec, each part alone and all together."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import codec_bridge
from codec_bridge.config import CodecConfig
from codec_bridge.network import build_network, tensor_shapes

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def codec():
    return codec_bridge.load(GOLDEN / "codec.pth", device="cpu")


@pytest.fixture(scope="module")
def network(codec):
    return build_network(codec.kind, codec.config, codec.tensors)


@pytest.fixture(scope="module")
def vectors():
    with np.load(GOLDEN / "vectors.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file if name.startswith("codec_")}


def padded(audio, hop):
    return torch.nn.functional.pad(audio, (0, -audio.shape[-1] % hop))


def test_the_file_tells_its_kind_and_sizes(codec):
    sizes = json.loads((GOLDEN / "meta.json").read_text())["codec"]
    assert codec.kind == "lac"
    assert codec.sample_rate == sizes["sample_rate"]
    assert codec.hop_length == np.prod(sizes["encoder_rates"])
    shape = (sizes["n_codebooks"], sizes["codebook_size"], sizes["codebook_dim"])
    assert codec.codebooks.shape == shape


@torch.no_grad()
def test_encoder(codec, network, vectors):
    # The first stage's projections follow from the encoder's output alone.
    latents = network.encoder(padded(vectors["codec_audio"], codec.hop_length))
    projected = network.quantizer.quantizers[0].in_proj(latents)
    expected = vectors["codec_latents"][:, : projected.shape[1]]
    assert (projected - expected).abs().max() < 1e-5 * expected.abs().max()


@torch.no_grad()
def test_quantiser_stages_choose_the_original_rows(codec, network, vectors):
    projections = vectors["codec_latents"].split(codec.config.codebook_dim, dim=1)
    tokens = vectors["codec_codes"].unbind(1)
    stages = network.quantizer.quantizers
    for stage, projected, expected in zip(stages, projections, tokens, strict=True):
        assert (stage.nearest(projected) == expected).all()


@torch.no_grad()
def test_quantiser_on_encoder_output(codec, network, vectors):
    latents = network.encoder(padded(vectors["codec_audio"], codec.hop_length))
    quantised, tokens, projections = network.quantizer(latents)
    assert (tokens == vectors["codec_codes"]).all()
    expected = vectors["codec_latents"]
    assert (projections - expected).abs().max() < 1e-5 * expected.abs().max()
    again, _ = network.quantizer.from_codes(tokens)
    assert (again - quantised).abs().max() < 1e-5


@torch.no_grad()
def test_decoder(network, vectors):
    latents, _ = network.quantizer.from_codes(vectors["codec_codes"].long())
    assert (network.decoder(latents) - vectors["codec_decoded"]).abs().max() < 1e-5


@pytest.mark.parametrize("chunk_seconds", [100, 0.25, 0.05])
def test_codec_end_to_end_whatever_the_chunk(codec, vectors, chunk_seconds):
    tokens = codec.encode(vectors["codec_audio"][:, 0].numpy(), chunk_seconds=chunk_seconds)
    np.testing.assert_array_equal(tokens, vectors["codec_codes"])
    sound = codec.decode(vectors["codec_codes"].numpy(), chunk_seconds=chunk_seconds)
    np.testing.assert_allclose(sound, vectors["codec_decoded"][:, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 0), ("bfloat16", None)])
def test_the_same_through_a_saved_file(codec, vectors, tmp_path, dtype, atol):
    codec_bridge.save(codec, tmp_path / "codec.safetensors", dtype=dtype)
    saved = codec_bridge.load(tmp_path, device="cpu")
    sound = np.asarray(saved.decode(vectors["codec_codes"].numpy()))
    expected = np.asarray(codec.decode(vectors["codec_codes"].numpy()))
    if atol is None:
        assert np.abs(sound - expected).max() < 0.05 * np.abs(expected).max()
        assert saved.fingerprint != codec.fingerprint
    else:
        np.testing.assert_array_equal(sound, expected)
        assert saved.fingerprint == codec.fingerprint


def test_the_official_size_has_the_official_shapes():
    official = json.loads((GOLDEN / "official_state_dict_shapes.json").read_text())["codec"]
    folded = {
        name.replace("weight_v", "weight"): tuple(shape)
        for name, shape in official.items()
        if not name.endswith("weight_g")
    }
    config = CodecConfig.from_kwargs(
        {
            "encoder_dim": 64,
            "encoder_rates": [2, 4, 8, 12],
            "decoder_dim": 1536,
            "decoder_rates": [12, 8, 4, 2],
            "n_codebooks": 14,
            "codebook_size": 1024,
            "codebook_dim": 8,
            "sample_rate": 44100,
        }
    )
    assert tensor_shapes("lac", config) == folded
