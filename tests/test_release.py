"""A model directory gives back the model that was saved, or says what is wrong with it."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from small_codecs import random_codec
from small_models import random_model

import vampnet_jax as vampnet
from codec_bridge.errors import InputError
from vampnet_jax import lora, release
from vampnet_jax.compression.frequencies import save_frequencies
from vampnet_jax.prompts import PRESETS, Prompt
from vampnet_jax.sampling import SamplingOptions


@pytest.fixture(scope="module")
def model():
    return random_model(random_codec())


@pytest.fixture
def saved(model, tmp_path):
    vampnet.save(model, tmp_path / "model")
    return tmp_path / "model"


def assert_same_arrays(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_what_is_saved_is_loaded(model, saved):
    loaded = vampnet.load(saved)
    for name in ("coarse", "fine"):
        (params, config), (want, want_config) = getattr(loaded, name), getattr(model, name)
        assert config == want_config
        assert_same_arrays(params, want)
    assert loaded.codec.fingerprint == model.codec.fingerprint
    assert (loaded.coarse_window, loaded.fine_window) == (40, 20)
    assert (loaded.name, loaded.card) == ("random", "# random\n")
    assert sorted(path.name for path in saved.parent.iterdir()) == ["model"]


def test_a_model_computes_in_another_dtype_with_attention_that_goes_with_it(model):
    half = model.computing_in("bfloat16")
    assert half.fine.config.dtype == half.coarse.config.dtype == "bfloat16"
    fast = half.coarse._replace(config=dataclasses.replace(half.coarse.config, attention="cudnn"))
    half = dataclasses.replace(half, coarse=fast)
    assert half.computing_in("bfloat16").coarse.config.attention == "cudnn"
    assert half.computing_in("float32").coarse.config == model.coarse.config


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_files_say_the_fingerprints_of_what_is_loaded_from_them(
    model, tmp_path, monkeypatch, dtype
):
    vampnet.save(model, tmp_path / "model", dtype=dtype)
    loaded = vampnet.load(tmp_path / "model")
    hashed = dataclasses.replace(loaded).fingerprints  # files know nothing of another object
    assert (hashed == model.fingerprints) == (dtype == "float32")
    swapped = dataclasses.replace(loaded, coarse=random_model(model.codec, seed=1).coarse)
    assert swapped.fingerprints["coarse"] != hashed["coarse"]
    assert swapped.fingerprints["fine"] == hashed["fine"]
    monkeypatch.setattr(release, "fingerprint", None)  # nothing is hashed again
    assert loaded.fingerprints == hashed
    assert swapped.fingerprints is swapped.fingerprints


def test_files_that_say_no_fingerprint_are_hashed(model, saved):
    path = saved / "coarse.safetensors"
    safetensors.numpy.save_file(safetensors.numpy.load_file(path), path)
    assert vampnet.load(saved).fingerprints == model.fingerprints


def test_the_fingerprint_is_that_of_weights_with_their_adapters_merged(model, tmp_path):
    config = lora.LoraConfig(rank=2, targets=("key",))
    adapters = lora.init(jax.random.key(0), model.coarse.config, config)
    adapters["key"]["b"] += 0.1
    vampnet.save(model, tmp_path / "model", adapters={"coarse": (adapters, config)})
    loaded = vampnet.load(tmp_path / "model")
    assert loaded.fingerprints == dataclasses.replace(loaded).fingerprints
    assert loaded.fingerprints["coarse"] != model.fingerprints["coarse"]


def test_how_a_model_is_best_sampled_is_kept_and_used(model, tmp_path):
    options = {
        "coarse_sampling": SamplingOptions(steps=3, typical_mass=None, top_p=0.5),
        "fine_sampling": SamplingOptions(steps=1, temperature=0.5),
    }
    vampnet.save(dataclasses.replace(model, **options), tmp_path / "model")
    loaded = vampnet.load(tmp_path / "model")
    assert loaded.coarse_sampling == options["coarse_sampling"]
    assert loaded.fine_sampling == options["fine_sampling"]
    tokens = jnp.zeros((1, 8, 30), jnp.int32)
    arguments = (tokens, tokens == 0, jax.random.key(0))
    got = vampnet.vamp(loaded, *arguments)
    want = vampnet.vamp(model, *arguments, options["coarse_sampling"], options["fine_sampling"])
    np.testing.assert_array_equal(got, want)
    assert (got != vampnet.vamp(model, *arguments)).any()


def test_presets_of_a_model_are_kept_and_used(model, tmp_path):
    own = {
        "small-variation": Prompt(periodic=4, width=3, upper_codebooks=8),
        "a-bar": Prompt(regions=((0.5, 1.0),)),
    }
    vampnet.save(dataclasses.replace(model, presets=model.presets | own), tmp_path / "model")
    loaded = vampnet.load(tmp_path / "model")
    assert loaded.presets == PRESETS | own
    assert vampnet.load().presets["medium-variation"] != PRESETS["medium-variation"]
    written = json.loads((tmp_path / "model" / "config.json").read_text())["presets"]
    assert written["small-variation"] == {"periodic": 4, "width": 3, "upper_codebooks": 8}


@pytest.mark.parametrize(
    ("presets", "words"),
    [
        ({"mine": {"periodic": -1}}, r"does not describe a model \(preset 'mine': periodic is -1"),
        ({"mine": {"periodic": 7.5}}, "periodic is 7.5; it must be a whole number"),
        ({"mine": {"periodic": True}}, "periodic is True; it must be a whole number"),
        ({"mine": {"periodic": None}}, "periodic is None; it must be a whole number"),
        ({"mine": {"periodic": 10**30}}, "it must be at most 1000000000"),
        ({"mine": {"beat_downbeats": 1}}, "beat_downbeats is 1; it must be true or false"),
        ({"mine": {"regions": [[1]]}}, "regions is .*; it must be pairs of numbers"),
        ({"mine": {"often": 3}}, "preset 'mine': there is no option 'often'"),
        (["mine"], "presets must be options by name"),
        ({"mine": 3}, "presets must be options by name"),
    ],
)
def test_impossible_presets_of_a_model_are_refused(saved, presets, words):
    description = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(description | {"presets": presets}))
    with pytest.raises(InputError, match=words):
        vampnet.load(saved)


def test_impossible_sampling_options_of_a_model_are_refused(saved):
    description = json.loads((saved / "config.json").read_text())
    description["coarse"]["sampling"] = {"temperature": -1.0}
    (saved / "config.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match="temperature is -1"):
        vampnet.load(saved)


def test_a_loaded_model_vamps_the_same(model, saved):
    tokens = jnp.zeros((1, 8, 30), jnp.int32)
    arguments = (tokens, tokens == 0, jax.random.key(0))
    np.testing.assert_array_equal(
        vampnet.vamp(vampnet.load(saved), *arguments), vampnet.vamp(model, *arguments)
    )


def test_bfloat16_rounds_once_and_halves_the_files(model, saved, tmp_path):
    vampnet.save(model, tmp_path / "small", dtype="bfloat16")
    once = vampnet.load(tmp_path / "small")
    vampnet.save(once, tmp_path / "again", dtype="bfloat16")
    again = vampnet.load(tmp_path / "again")
    assert_same_arrays(once.coarse.params, again.coarse.params)
    assert once.codec.fingerprint == again.codec.fingerprint
    assert once.coarse.params["norm"].dtype == jnp.float32
    size, full = ((d / "fine.safetensors").stat().st_size for d in (tmp_path / "small", saved))
    assert size < 0.6 * full
    np.testing.assert_allclose(
        once.fine.params["head"]["kernel"], model.fine.params["head"]["kernel"], rtol=2**-8
    )


def test_an_existing_directory_is_replaced_only_when_asked(model, saved):
    (saved / "config.json").write_text("mine")
    with pytest.raises(InputError, match="exists"):
        vampnet.save(model, saved)
    assert (saved / "config.json").read_text() == "mine"
    vampnet.save(model, saved, overwrite=True)
    assert vampnet.load(saved).name == "random"
    assert sorted(path.name for path in saved.parent.iterdir()) == ["model"]


def test_an_empty_directory_is_filled_and_a_foreign_one_left_alone(model, tmp_path):
    (tmp_path / "empty").mkdir()
    vampnet.save(model, tmp_path / "empty")
    assert vampnet.load(tmp_path / "empty").name == "random"
    (tmp_path / "songs").mkdir()
    (tmp_path / "songs" / "mine.wav").touch()
    with pytest.raises(InputError, match="is no model directory"):
        vampnet.save(model, tmp_path / "songs", overwrite=True)
    assert (tmp_path / "songs" / "mine.wav").exists()


@pytest.mark.parametrize("inside", ["checkpoints/", "log.jsonl"])
def test_a_folder_that_only_looks_like_a_model_is_left_alone(model, tmp_path, inside):
    """A training run has a config.json too."""
    vampnet.save(model, tmp_path / "run")
    if inside.endswith("/"):
        (tmp_path / "run" / inside).mkdir()
    else:
        (tmp_path / "run" / inside).touch()
        (tmp_path / "run" / "coarse.safetensors").unlink()
    with pytest.raises(InputError, match="is no model directory"):
        vampnet.save(model, tmp_path / "run", overwrite=True)
    assert (tmp_path / "run" / inside).exists()


def test_what_lies_beside_a_model_stays_when_it_is_replaced_or_goes_along(model, saved, tmp_path):
    frequencies = np.ones((8, 64))
    save_frequencies(saved, frequencies, model.codec.fingerprint)
    (saved / "COPYING").write_text("a licence")
    table = (saved / "frequencies.safetensors").read_bytes()
    vampnet.save(model, saved, overwrite=True)
    vampnet.save(model, tmp_path / "other", companions=saved)
    for folder in (saved, tmp_path / "other"):
        assert (folder / "COPYING").read_text() == "a licence"
        assert (folder / "frequencies.safetensors").read_bytes() == table
    config = lora.LoraConfig(rank=2, targets=("key",))
    adapted = {"coarse": (lora.init(jax.random.key(0), model.coarse.config, config), config)}
    vampnet.save(model, saved, overwrite=True, adapters=adapted)
    assert (saved / "coarse.lora.safetensors").exists()
    other = random_model(random_codec(seed=5))
    vampnet.save(other, saved, overwrite=True)  # the counts are of another codec's tokens
    assert {path.name for path in saved.iterdir()} == {*release.FILES, "MODEL_CARD.md", "COPYING"}


def test_a_description_that_is_nested_without_end_is_refused(saved):
    (saved / "config.json").write_text("[" * 200_000)
    with pytest.raises(InputError, match="nested too deeply"):
        vampnet.load(saved)


def test_a_save_that_fails_leaves_what_was_there(model, saved, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(release, "_save_stage", fail)
    with pytest.raises(InputError, match="No space left"):
        vampnet.save(model, saved, overwrite=True)
    monkeypatch.undo()
    assert vampnet.load(saved).name == "random"
    assert sorted(path.name for path in saved.parent.iterdir()) == ["model"]


def test_a_place_that_cannot_be_written_is_named(model, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        vampnet.save(model, tmp_path / "file" / "model")


@pytest.mark.parametrize("name", release.FILES)
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(InputError, match=rf"has no {name}"):
        vampnet.load(saved)


@pytest.mark.parametrize("name", release.FILES)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_refused(saved, name, share):
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError):
        vampnet.load(saved)


def test_a_model_that_does_not_exist_lists_those_that_do(tmp_path):
    with pytest.raises(InputError, match="there is no model 'nowhere'"):
        vampnet.load("nowhere")


def change(saved, path, value):
    description = json.loads((saved / "config.json").read_text())
    node = description
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    (saved / "config.json").write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format_version"], 99, "format 99"),
        (["name"], 7, "name is not a string"),
        (["coarse", "window"], 0, "window"),
        (["coarse", "window"], 10**12, "window"),
        (["coarse", "config", "embedding_dim"], 10**15, "embedding_dim"),
        (["coarse", "sampling", "steps"], "24", "steps is '24'"),
        (["coarse", "sampling", "temperature"], None, "temperature is None"),
        (["coarse", "window"], "long", "window"),
        (["coarse", "config", "n_layers"], 2, "does not fit its config.json"),
        (["coarse", "config", "n_layers"], -1, "at least 1"),
        (["coarse", "config", "n_layers"], "two", "n_layers"),
        (["coarse", "config", "colour"], "red", "colour"),
        (["coarse", "config"], [], "describe"),
        (["codec", "fingerprint"], "0" * 64, "not the one"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_description_that_does_not_fit_is_refused(saved, path, value, message):
    change(saved, path, value)
    with pytest.raises(InputError, match=message):
        vampnet.load(saved)


def test_a_codec_of_another_model_is_refused(saved, tmp_path):
    vampnet.save(random_model(random_codec(seed=1)), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "codec.safetensors", saved)
    with pytest.raises(InputError, match="not the one that its models speak"):
        vampnet.load(saved)


def test_stages_that_do_not_belong_together_are_refused(model):
    with pytest.raises(InputError, match="do not belong together"):
        vampnet.Model(model.coarse, model.coarse, model.codec, 40, 20)
    with pytest.raises(InputError, match="do not belong together"):
        vampnet.Model(model.fine, model.fine, model.codec, 40, 20)
    with pytest.raises(InputError, match="the codec has only 4"):
        vampnet.Model(model.coarse, model.fine, random_codec(n_codebooks=4), 40, 20)
    with pytest.raises(InputError, match="knows 64 codes"):
        vampnet.Model(model.coarse, model.fine, random_codec(codebook_size=32), 40, 20)
