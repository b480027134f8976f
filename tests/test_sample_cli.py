"""`sample.py`: every option does something, bad input gets one sentence, results are whole."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile
from small_codecs import random_codec
from small_models import random_model

import vampnet_jax as vampnet
from vampnet_jax import cli, figures, pipeline, tokens
from vampnet_jax.cli.sample_options import parse, prompt_of, sampling_of, with_defaults_of
from vampnet_jax.prompts import PRESETS, Prompt
from vampnet_jax.vamping import vamp

RATE = 8000
ROOT = Path(__file__).parent.parent
QUICK = ["--steps", "2", "--fine-steps", "2", "--typical-min-tokens", "8"]
QUICK += ["--fine-typical-min-tokens", "8", "--seed", "7"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models, and clips of 0.64 s, of 0.32 s (40 frames, one window) and of 4 s with clicks."""
    folder = tmp_path_factory.mktemp("sample")
    for name, seed in (("model", 0), ("other", 5)):
        model = random_model(random_codec(seed=seed), seed=seed)
        vampnet.save(dataclasses.replace(model, fine_window=40), folder / name)
    seconds = np.arange(round(0.64 * RATE)) / RATE
    music = 0.2 * np.sin(2 * np.pi * 330 * seconds) * (1 + np.sin(20 * seconds)) / 2
    soundfile.write(folder / "clip.wav", music, RATE)
    soundfile.write(folder / "brief.wav", music[:2560], RATE)
    soundfile.write(folder / "wide.wav", np.stack([music, 0.5 * music[::-1]], axis=1), RATE)
    clicks = 1e-3 * np.random.default_rng(0).standard_normal(4 * RATE)
    for i, start in enumerate(range(2000, 4 * RATE - 400, 4000)):
        clicks[start : start + 400] += (0.8 if i % 4 == 1 else 0.3) * np.sin(np.arange(400))
    soundfile.write(folder / "clicks.wav", clicks, RATE)
    return folder


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path, folder):
    """Run in an empty folder, without touching the user's cache or JAX's settings for others."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield
    jax.config.update("jax_default_device", None)


@pytest.fixture
def sample(folder, capsys):
    """Run the command and return its exit code, standard output and standard error."""

    def run(*arguments: str | Path, model: str | Path | None = "model", quick: bool = True):
        command = [str(argument) for argument in arguments]
        if model is not None:
            command += ["--model", str(folder / model)]
        with pytest.raises(SystemExit) as exit_:
            cli.run("sample", command + QUICK * quick)
        captured = capsys.readouterr()
        return exit_.value.code, captured.out, captured.err

    return run


@pytest.fixture
def without_pictures(monkeypatch):
    monkeypatch.setattr(figures, "draw_variation", lambda path, **_: Path(path).touch())


def files(path: Path) -> list[str]:
    return sorted(found.name for found in path.iterdir()) if path.exists() else []


def refused(result: tuple[int, str, str], words: str, output: Path = Path("vamped")) -> None:
    """One sentence, exit code 2, nothing written."""
    code, out, err = result
    assert code == 2
    assert words in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert not out
    assert not output.exists()


# What is written


def test_what_is_not_given_is_as_the_model_is_best_sampled(sample, folder, tmp_path):
    tuned = dataclasses.replace(
        vampnet.load(folder / "model"),
        coarse_sampling=vampnet.SamplingOptions(steps=3, temperature=0.9, typical_mass=None),
        fine_sampling=vampnet.SamplingOptions(steps=1, top_k=15),
    )
    vampnet.save(tuned, tmp_path / "tuned")
    options = ["--temperature", "0.8", "--fine-top-k", "off", "--seed", "1", "-o", "out"]
    code, _, _ = sample(folder / "brief.wav", *options, model=tmp_path / "tuned", quick=False)
    assert code == 0
    record = json.loads(Path("out/brief_1.json").read_text())
    assert (record["coarse"]["steps"], record["coarse"]["typical_mass"]) == (3, None)
    assert record["coarse"]["temperature"] == 0.8
    assert (record["fine"]["steps"], record["fine"]["top_k"]) == (1, None)
    again = ["--from-params", "out/brief_1.json", "-o", "again"]
    assert sample(*again, model=None, quick=False)[0] == 0
    assert Path("again/brief_1.wav").read_bytes() == Path("out/brief_1.wav").read_bytes()


def test_each_variation_has_sound_picture_and_record(sample, folder):
    code, out, _ = sample(folder / "clip.wav", "-o", "out/deep", "--num-samples", "2")
    assert code == 0
    names = [f"clip_{k}.{ending}" for k in (1, 2) for ending in ("json", "png", "wav")]
    assert files(Path("out/deep")) == names
    assert "seed 7" in out
    assert "clip_2.wav" in out
    first, second = (soundfile.read(f"out/deep/clip_{k}.wav") for k in (1, 2))
    assert first[1] == RATE
    assert len(first[0]) == len(second[0]) == round(0.64 * RATE)
    assert np.abs(first[0] - second[0]).max() > 0.01
    record = json.loads(Path("out/deep/clip_2.json").read_text())
    assert record["options"]["seed"] == 7
    assert record["variation"] == 2
    assert record["prompt"]["periodic"] == 7  # the default preset
    assert len(record["model"]["codec"]) == 64
    assert "jax" in record["environment"]["versions"]


def test_several_inputs_are_each_vamped_as_if_alone(sample, folder, without_pictures):
    both = [folder / "clip.wav", folder / "wide.wav"]
    assert sample(*both, "-o", "both")[0] == 0
    assert sample(both[1], "-o", "alone")[0] == 0
    assert [name for name in files(Path("both")) if name.endswith(".wav")] == [
        "clip_1.wav",
        "wide_1.wav",
    ]
    assert Path("both/wide_1.wav").read_bytes() == Path("alone/wide_1.wav").read_bytes()


def test_a_drawn_seed_is_shown_and_saved_and_differs(sample, folder, without_pictures):
    seeds = []
    for output in ("a", "b"):
        quick = [word for word in QUICK if word not in ("--seed", "7")]
        _, out, _ = sample(folder / "clip.wav", "-o", output, *quick, quick=False)
        seed = json.loads(Path(output, "clip_1.json").read_text())["options"]["seed"]
        assert f"seed {seed}," in out
        seeds.append(seed)
    assert seeds[0] != seeds[1]


# Repeating


def test_from_params_repeats_a_run_bit_for_bit(sample, folder):
    options = ["--num-samples", "2", "--periodic", "5", "--region", "0.1:0.3", "--top-k", "9"]
    assert sample(folder / "clip.wav", "-o", "a", *options, "--dropout", "0.3", "--stereo")[0] == 0
    again = ["--from-params", "a/clip_2.json"]
    assert sample(*again, "-o", "b", model=None, quick=False)[0] == 0
    for name in files(Path("a")):
        if name.endswith(".wav"):
            assert Path("a", name).read_bytes() == Path("b", name).read_bytes()
    records = [json.loads(Path(f, "clip_2.json").read_text()) for f in "ab"]
    assert records[0] == records[1]
    refused(
        sample(*again, "--model", folder / "other", model=None, quick=False, ),
        "has other weights",
    )  # fmt: skip
    refused(sample(*again, "--steps", "3", model=None, quick=False), "repeats an earlier run")


def test_from_params_can_take_other_audio(sample, folder, without_pictures):
    assert sample(folder / "clip.wav", "-o", "a", "--periodic", "3")[0] == 0
    arguments = [folder / "wide.wav", "--from-params", "a/clip_1.json", "-o", "b"]
    assert sample(*arguments, model=None, quick=False)[0] == 0
    assert json.loads(Path("b/wide_1.json").read_text())["prompt"]["periodic"] == 3


def test_from_params_notices_changed_files(sample, folder, without_pictures):
    Path("clip.wav").write_bytes((folder / "clip.wav").read_bytes())
    np.save("m.npy", np.ones(80, bool))
    assert sample("clip.wav", "-o", "a", "--mask", "m.npy")[0] == 0
    again = ["--from-params", "a/clip_1.json"]
    np.save("m.npy", np.zeros(80, bool))
    refused(sample(*again, model=None, quick=False), "m.npy has changed")
    soundfile.write("clip.wav", np.zeros(5120), RATE)
    refused(sample(*again, model=None, quick=False), "clip.wav has changed")
    Path("clip.wav").unlink()
    refused(sample(*again, model=None, quick=False), "not there any more")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read"),
        ("no json", "not a JSON file"),
        ("[1]", "not the record of a run"),
        ('{"options": {}, "input": null, "mask": null, "model": {}}', "format None"),
        (
            '{"format_version": 1, "options": {}, "input": null, "mask": null, "model": {}}',
            "other options than this version",
        ),
        (
            '{"format_version": 1, "options": {}, "input": {}, "mask": null, "model": {}}',
            "does not say which input",
        ),
    ],
)
def test_records_that_are_none_are_refused(sample, text, words):
    if text is not None:
        Path("r.json").write_text(text)
    refused(sample("--from-params", "r.json", model=None, quick=False), words)


# Nothing is lost


def test_nothing_is_replaced_without_overwrite(sample, folder, without_pictures):
    assert sample(folder / "clip.wav")[0] == 0
    before = Path("vamped/clip_1.wav").read_bytes()
    code, _, err = sample(folder / "clip.wav", "--seed", "8")
    assert code == 2
    assert "--overwrite" in err
    assert Path("vamped/clip_1.wav").read_bytes() == before
    assert sample(folder / "clip.wav", "--overwrite", "--periodic", "3")[0] == 0
    assert Path("vamped/clip_1.wav").read_bytes() != before


def test_an_input_is_never_replaced(sample, folder):
    Path("in").mkdir()
    for name in ("clip.wav", "clip_1.wav"):
        Path("in", name).write_bytes((folder / "clip.wav").read_bytes())
    before = Path("in/clip_1.wav").read_bytes()
    code, _, err = sample("in/clip.wav", "in/clip_1.wav", "-o", "in", "--overwrite")
    assert code == 2
    assert "is an input" in err
    assert Path("in/clip_1.wav").read_bytes() == before


def test_a_failure_leaves_everything_as_it_was(sample, folder, monkeypatch, without_pictures):
    assert sample(folder / "clip.wav")[0] == 0
    before = {name: Path("vamped", name).read_bytes() for name in files(Path("vamped"))}

    def fail(*_):
        raise MemoryError("no memory")

    monkeypatch.setattr(pipeline, "decode", fail)
    with pytest.raises(MemoryError):
        cli.run("sample", [str(folder / "clip.wav"), "--model", str(folder / "model"),
                           "--overwrite", *QUICK])  # fmt: skip
    assert {name: Path("vamped", name).read_bytes() for name in files(Path("vamped"))} == before
    with pytest.raises(MemoryError):
        cli.run("sample", [str(folder / "clip.wav"), "--model", str(folder / "model"),
                           "-o", "new/folder", *QUICK])  # fmt: skip
    assert not Path("new").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
@pytest.mark.parametrize("reason", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_at_once_and_leaves_nothing(folder, tmp_path, reason):
    command = [sys.executable, str(ROOT / "sample.py"), "--seconds", "600", "--steps", "100000"]
    command += ["--model", str(folder / "model"), "-o", "out"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # "seed …": everything is loaded
        time.sleep(1.0)
        assert files(tmp_path / "out")  # the hidden folder for unfinished results
        start = time.monotonic()
        process.send_signal(reason)
        _, err = process.communicate(timeout=60)
        assert time.monotonic() - start < 5  # what it had begun would take hours
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert b"interrupted" in err
    assert not (tmp_path / "out").exists()


# Every option does something


PERIODIC = {"--periodic": "5", "--offset": "0"}
BEAT = {"--beat": "0.05"}


@pytest.fixture(scope="module")
def results():
    """Tokens by options, so that what others are compared with is computed once."""
    return {}


@pytest.mark.parametrize(
    ("clip", "base", "option", "value"),
    [
        ("brief", PERIODIC, "--periodic", "4"),
        ("brief", PERIODIC, "--width", "3"),
        ("brief", PERIODIC, "--offset", "2"),
        ("brief", PERIODIC, "--prefix", "0.1"),
        ("brief", PERIODIC, "--suffix", "0.1"),
        ("brief", PERIODIC, "--region", "0.1:0.2"),
        ("brief", PERIODIC, "--random", "0.5"),
        ("brief", PERIODIC, "--dropout", "0.5"),
        ("brief", PERIODIC, "--keep-codebooks", "1"),
        ("brief", PERIODIC, "--upper-codebooks", "2"),
        ("brief", PERIODIC, "--stretch", "2"),
        ("brief", PERIODIC, "--pitch", "5"),
        ("brief", PERIODIC, "--extend", "0.2"),
        ("brief", PERIODIC, "--feedback", "1"),
        ("brief", PERIODIC, "--seed", "8"),
        ("brief", PERIODIC, "--model", "other"),
        ("brief", PERIODIC, "--dtype", "bfloat16"),
        ("brief", PERIODIC, "--dtype", "bfloat16-products"),
        ("brief", PERIODIC, "--steps", "3"),
        ("brief", PERIODIC, "--temperature", "3"),
        ("brief", PERIODIC, "--mask-temperature", "0"),
        ("brief", PERIODIC, "--sample-cutoff", "0"),
        ("brief", PERIODIC, "--top-k", "3"),
        ("brief", PERIODIC, "--top-p", "0.3"),
        ("brief", PERIODIC, "--typical-mass", "off"),
        ("brief", PERIODIC, "--typical-min-tokens", "40"),
        ("brief", PERIODIC, "--order", "spread"),
        ("brief", PERIODIC, "--codebook-steps", "1,2"),
        ("brief", PERIODIC, "--entropy-bound", "100000"),
        ("brief", PERIODIC, "--guidance", "2"),
        ("brief", PERIODIC, "--fine-steps", "1"),
        ("brief", PERIODIC, "--fine-temperature", "3"),
        ("brief", PERIODIC, "--fine-mask-temperature", "0"),
        ("brief", PERIODIC, "--fine-sample-cutoff", "0"),
        ("brief", PERIODIC, "--fine-top-k", "3"),
        ("brief", PERIODIC, "--fine-top-p", "0.3"),
        ("brief", PERIODIC, "--fine-typical-mass", "None"),
        ("brief", PERIODIC, "--fine-typical-min-tokens", "40"),
        ("brief", PERIODIC, "--fine-order", "spread"),
        ("brief", PERIODIC, "--fine-codebook-steps", "1,2,1,1,1,1"),
        ("brief", PERIODIC, "--fine-entropy-bound", "100000"),
        ("brief", PERIODIC, "--fine-guidance", "2"),
        ("brief", {}, "--preset", "small-variation"),
        ("wide", PERIODIC, "--stereo", None),
        ("clicks", PERIODIC, "--onset", "2"),
        ("clicks", PERIODIC, "--beat", "0.05"),
        ("clicks", PERIODIC, "--beat-before", "0.05"),
        ("clicks", BEAT, "--beat-downbeats", None),
        ("clicks", BEAT, "--beat-every", "2"),
        ("clicks", BEAT, "--beat-dropout", "0.9"),
    ],
)
def test_every_option_changes_the_result(
    sample, folder, without_pictures, results, clip, base, option, value
):
    def made(options: dict[str, str | None]) -> np.ndarray:
        key = (clip, *options.items())
        if key not in results:
            options = dict(zip(QUICK[::2], QUICK[1::2], strict=True)) | options
            model = options.pop("--model", "model")
            words = [word for pair in options.items() for word in pair if word is not None]
            arguments = [folder / f"{clip}.wav", "--tokens", "--overwrite", *words]
            assert sample(*arguments, model=model, quick=False)[0] == 0
            results[key] = tokens.read(f"vamped/{clip}_1.npz").tokens
        return results[key]

    assert not np.array_equal(made(base), made(base | {option: value}))


def test_own_masks_are_obeyed(sample, folder, without_pictures):
    mask = np.random.default_rng(0).integers(0, 2, (8, 80))
    np.save("m.npy", mask)
    assert sample(folder / "clip.wav", "--tokens", "-o", "all", "--periodic", "1")[0] == 0
    assert sample(folder / "clip.wav", "--tokens", "-o", "some", "--mask", "m.npy")[0] == 0
    kept, made = (tokens.read(f"{f}/clip_1.npz").tokens[0] for f in ("all", "some"))
    np.testing.assert_array_equal(made[mask == 0], kept[mask == 0])
    assert (made[mask == 1] != kept[mask == 1]).mean() > 0.9
    np.save("m.npy", mask[:, 1:])
    refused(sample(folder / "clip.wav", "--mask", "m.npy"), "needs (8, 80)")
    Path("m.npy").write_text("1 0 1")
    refused(sample(folder / "clip.wav", "--mask", "m.npy"), "not a .npy file")


def test_token_files_go_in_and_out(sample, folder):
    assert sample(folder / "clip.wav", "--tokens", "-o", "a")[0] == 0
    assert files(Path("a")) == ["clip_1.json", "clip_1.npz", "clip_1.png"]
    assert sample("a/clip_1.npz", "--tokens", "--periodic", "1", "-o", "b")[0] == 0
    first, again = tokens.read("a/clip_1.npz"), tokens.read("b/clip_1_1.npz")
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert (first.n_samples, first.gain_db) == (again.n_samples, again.gain_db)
    assert sample("a/clip_1.npz", "--onset", "1", "-o", "c")[0] == 0
    assert len(soundfile.read("c/clip_1_1.wav")[0]) == round(0.64 * RATE)
    refused(sample("a/clip_1.npz", model="other"), "tokens of another codec")
    refused(sample("a/clip_1.npz", "--pitch", "3"), "--pitch needs audio")
    refused(sample("a/clip_1.npz", "--region", "0.5:0.7"), "beyond the clip")


def test_music_from_nothing(sample):
    assert sample("--seconds", "0.32", "-o", "out", "--num-samples", "2")[0] == 0
    assert len(files(Path("out"))) == 6
    samples, _ = soundfile.read("out/from-nothing_1.wav")
    assert len(samples) == round(0.32 * RATE)
    again = ["--from-params", "out/from-nothing_1.json", "-o", "b"]
    assert sample(*again, model=None, quick=False)[0] == 0
    assert Path("out/from-nothing_2.wav").read_bytes() == Path("b/from-nothing_2.wav").read_bytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--periodic", "7"], "--periodic needs an input"),
        (["--extend", "1"], "--extend needs an input"),
        (["--feedback", "1"], "--feedback needs an input"),
        (["--preset", "small-variation"], "--preset needs an input"),
        (["--mask", "m.npy"], "--mask needs an input"),
        (["--seconds", "0"], "--seconds is 0"),
        (["--seconds", "1e9"], "--seconds is 1e+09"),
    ],
)
def test_from_nothing_there_is_nothing_to_keep(sample, options, words):
    refused(sample("--seconds", "1", *options), words)


def test_extension_or_stretch_alone_keep_the_clip(sample, folder, without_pictures):
    clip = folder / "clip.wav"
    assert sample(clip, "--tokens", "-o", "same", "--periodic", "1")[0] == 0
    assert sample(clip, "--tokens", "-o", "longer", "--extend", "0.2")[0] == 0
    assert sample(clip, "--tokens", "-o", "slower", "--stretch", "2")[0] == 0
    same, longer, slower = (
        tokens.read(f"{name}/clip_1.npz").tokens for name in ("same", "longer", "slower")
    )
    np.testing.assert_array_equal(longer[..., :80], same)
    assert longer.shape[-1] == 80 + 25
    np.testing.assert_array_equal(slower[..., ::2], same)
    assert slower.shape[-1] == 160


def test_unconditional_keeps_nothing_and_refinements_keep_the_default_preset(
    sample, folder, without_pictures
):
    def prompt(*options):
        assert sample(folder / "clip.wav", "--overwrite", *options)[0] == 0
        return json.loads(Path("vamped/clip_1.json").read_text())["prompt"]

    assert prompt("--preset", "unconditional")["periodic"] == 0
    assert prompt("--dropout", "0.1")["periodic"] == 7
    assert prompt("--preset", "large-variation", "--periodic", "11")["dropout"] == 0.2
    assert prompt("--prefix", "0.1")["periodic"] == 0


@pytest.mark.parametrize(
    ("arguments", "prompt"),
    [
        (["--periodic", "0"], Prompt()),
        (["--periodic", "5", "--offset", "0"], Prompt(periodic=5, offset=0)),
        (["--preset", "large-variation", "--dropout", "0", "--upper-codebooks", "0"],
         Prompt(periodic=13, dropout=0.0, upper_codebooks=0)),
    ],
)  # fmt: skip
def test_zero_is_not_the_same_as_nothing_given(folder, arguments, prompt):
    options = with_defaults_of(folder / "model", parse(["clip.wav", *arguments]))
    assert prompt_of(options) == prompt


@pytest.mark.parametrize(
    ("arguments", "codebook_steps"),
    [
        ([], (2, 1)),
        (["--entropy-bound", "off", "--guidance", "1"], (2, 1)),
        (["--steps", "3"], None),
        (["--entropy-bound", "9"], None),
        (["--steps", "3", "--codebook-steps", "1,2"], (1, 2)),
    ],
)
def test_steps_asked_for_all_codebooks_replace_a_models_own_by_codebook(
    folder, tmp_path, arguments, codebook_steps
):
    model = vampnet.load(folder / "model")
    sampling = dataclasses.replace(model.coarse_sampling, codebook_steps=(2, 1))
    vampnet.save(dataclasses.replace(model, coarse_sampling=sampling), tmp_path / "mine")
    options = with_defaults_of(tmp_path / "mine", parse(["clip.wav", *arguments]))
    assert sampling_of(options).codebook_steps == codebook_steps


def test_a_model_may_have_presets_of_its_own(sample, folder, without_pictures):
    model = vampnet.load(folder / "model")
    own = Prompt(periodic=4, width=3, regions=((0.1, 0.3),))
    presets = model.presets | {"medium-variation": own}
    vampnet.save(dataclasses.replace(model, presets=presets), "mine")
    code, out, _ = sample(folder / "clip.wav", model=Path("mine").absolute())
    assert code == 0
    assert own.describe() in out
    record = json.loads(Path("vamped/clip_1.json").read_text())
    assert (record["prompt"]["periodic"], record["prompt"]["width"]) == (4, 3)
    # The record says what the preset was, so that it can be repeated after it has changed.
    again = ["--from-params", "vamped/clip_1.json", "--model", folder / "model", "-o", "again"]
    assert sample(*again, model=None, quick=False)[0] == 0
    repeated = json.loads(Path("again/clip_1.json").read_text())
    assert repeated["prompt"] == record["prompt"]
    same = Path("vamped/clip_1.wav").read_bytes()
    assert Path("again/clip_1.wav").read_bytes() == same


def test_a_record_keeps_the_dtype_that_the_model_computes_in(sample, folder, without_pictures):
    exact = vampnet.load(folder / "model")
    vampnet.save(exact.computing_in("bfloat16-products"), "rounding")
    assert sample(folder / "clip.wav", model=Path("rounding").absolute())[0] == 0
    record = json.loads(Path("vamped/clip_1.json").read_text())
    assert record["options"]["dtype"] == "bfloat16-products"
    again = ["--from-params", "vamped/clip_1.json", "--model", folder / "model", "-o", "again"]
    assert sample(*again, model=None, quick=False)[0] == 0
    repeated = json.loads(Path("again/clip_1.json").read_text())
    assert repeated["options"]["dtype"] == "bfloat16-products"
    same = Path("vamped/clip_1.wav").read_bytes()
    assert Path("again/clip_1.wav").read_bytes() == same


@pytest.mark.parametrize("options", [["--periodic", "0"], ["--beat", "0"]])
def test_what_only_refines_a_preset_goes_with_it(folder, options):
    presets = PRESETS | {
        "medium-variation": Prompt(periodic=4, width=3, beat=0.1, beat_every=2, beat_dropout=0.1)
    }
    model = dataclasses.replace(vampnet.load(folder / "model"), presets=presets)
    vampnet.save(model, "mine")
    given = parse(["clip.wav", "--preset", "medium-variation", *options])
    prompt = prompt_of(with_defaults_of(Path("mine"), given))
    assert (prompt.periodic, prompt.width) == ((0, 1) if "--periodic" in options else (4, 3))
    assert (prompt.beat, prompt.beat_every) == ((0, 1) if "--beat" in options else (0.1, 2))


def test_a_preset_asks_for_no_more_codebooks_than_the_model_has(folder):
    model = dataclasses.replace(
        vampnet.load(folder / "model"), presets={"medium-variation": Prompt(upper_codebooks=99)}
    )
    vampnet.save(model, "mine")
    options = with_defaults_of(Path("mine"), parse(["clip.wav"]))
    assert prompt_of(options).upper_codebooks == 8


def test_a_record_whose_options_mean_something_else_now_is_refused(
    sample, folder, without_pictures
):
    assert sample(folder / "clip.wav")[0] == 0
    record = json.loads(Path("vamped/clip_1.json").read_text())
    record["prompt"]["periodic"] = 8
    Path("vamped/clip_1.json").write_text(json.dumps(record))
    again = ["--from-params", "vamped/clip_1.json", "-o", "again"]
    result = sample(*again, model=None, quick=False)
    refused(result, "understands its options otherwise (prompt)", Path("again"))


def test_device(sample, folder, without_pictures, monkeypatch):
    codecs = []

    def watched(model, *args, **options):
        codecs.append(model.codec.device)
        return vamp(model, *args, **options)

    monkeypatch.setattr(pipeline, "vamp", watched)
    assert sample(folder / "clip.wav", "--device", "cpu")[0] == 0
    record = json.loads(Path("vamped/clip_1.json").read_text())
    assert record["environment"]["device"] == "cpu"
    assert codecs == ["cpu"]
    if jax.default_backend() == "cpu":
        for device in ("gpu", "tpu"):
            result = sample(folder / "clip.wav", "--device", device, "-o", "none")
            refused(result, f"--device is '{device}', but JAX finds no", Path("none"))


@pytest.mark.parametrize("mesh", ["data=2", "tensor=2"])
def test_a_mesh_of_two_devices_makes_the_same_music(
    sample, folder, without_pictures, monkeypatch, mesh
):
    used = []

    def watched(model, *args, **options):
        used.append({len(x.sharding.device_set) for x in jax.tree.leaves(model.coarse.params)})
        return vamp(model, *args, **options)

    monkeypatch.setattr(pipeline, "vamp", watched)
    options = [folder / "clip.wav", "--num-samples", "2"]
    assert sample(*options, "-o", "one")[0] == 0
    assert sample(*options, "-o", "two", "--mesh", mesh)[0] == 0
    assert used == [{1}, {2}]
    for name in ("clip_1.wav", "clip_2.wav", "clip_1.json"):
        assert Path("one", name).read_bytes() == Path("two", name).read_bytes()
    again = ["--from-params", "one/clip_2.json", "--mesh", mesh, "-o", "again"]
    assert sample(*again, model=None, quick=False)[0] == 0
    assert Path("again/clip_2.wav").read_bytes() == Path("one/clip_2.wav").read_bytes()


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        ("data=4", "needs 4 devices; there are 2"),
        ("tensor=4", "does not divide"),
        ("batch=2", "write sizes of data, fsdp and tensor"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(sample, folder, mesh, words):
    refused(sample(folder / "clip.wav", "--mesh", mesh), words)


def test_compiled_programs_are_kept_in_the_users_cache(folder, tmp_path):
    environment = {name: value for name, value in os.environ.items() if "JAX_COMP" not in name}
    environment["XDG_CACHE_HOME"] = environment["LOCALAPPDATA"] = str(tmp_path / "cache")
    environment["HOME"] = str(tmp_path)
    command = [sys.executable, str(ROOT / "sample.py"), str(folder / "clip.wav"), *QUICK]
    command += ["--model", str(folder / "model")]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    assert any(path.is_file() for path in tmp_path.rglob("*vampnet_jax/jax/*"))


# Bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", "0"], "--steps is 0"),
        (["--fine-steps", "0"], "--fine-steps is 0"),
        (["--temperature", "-1"], "--temperature is -1"),
        (["--fine-temperature", "0"], "set --fine-sample-cutoff to 0"),
        (["--mask-temperature", "-1"], "--mask-temperature is -1"),
        (["--top-k", "0"], "--top-k is 0"),
        (["--top-p", "-0.5"], "--top-p is -0.5"),
        (["--top-p", "2"], "--top-p is 2.0; it must be a number from 0 to 1"),
        (["--typical-mass", "3"], "--typical-mass is 3"),
        (["--fine-sample-cutoff", "7"], "--fine-sample-cutoff is 7"),
        (["--typical-mass", "nan"], "--typical-mass is nan"),
        (["--sample-cutoff", "-1"], "--sample-cutoff is -1"),
        (["--preset", "huge-variation"], "no preset 'huge-variation'"),
        (["--periodic", "-3"], "--periodic is -3"),
        (["--width", "3", "--onset", "1"], "--width and --offset need --periodic"),
        (["--beat-downbeats"], "need --beat or --beat-before"),
        (["--region", "0.5:0.2"], "ends before it starts"),
        (["--region", "0.5:2"], "reaches beyond the clip, which ends at 0.64 s"),
        (["--region", "half"], "--region is 'half'"),
        (["--prefix", "2"], "--prefix is 2 s but the clip lasts only 0.64 s"),
        (["--beat-every", "0"], "--beat-every is 0"),
        (["--dropout", "1.5"], "--dropout is 1.5"),
        (["--keep-codebooks", "9"], "has 8 codebooks"),
        (["--codebook-steps", "two"], "--codebook-steps is 'two'"),
        (["--fine-codebook-steps", "1,1"], "2 numbers; the model predicts"),
        (["--fine-entropy-bound", "1", "--fine-order", "spread"], "--fine-entropy-bound chooses"),
        (["--num-samples", "0"], "--num-samples is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--seed", "4294967296"], "--seed is 4294967296"),
        (["--stretch", "0"], "--stretch is 0"),
        (["--pitch", "13"], "--pitch is 13"),
        (["--pitch", "nan"], "--pitch is nan"),
        (["--extend", "-1"], "--extend is -1"),
        (["--extend", "1e12"], "--extend is 1e+12; it must be from 0 to 3600 seconds"),
        (["--stretch", "10000000"], "--stretch is 10000000"),
        (["--num-samples", "1000000000"], "--num-samples is 1000000000"),
        (["--periodic", str(10**30)], "--periodic is"),
        (["--periodic", "5", "--width", str(10**30)], "--width is"),
        (["--feedback", "-1"], "--feedback is -1"),
        (["--mask", "none.npy"], "no mask none.npy"),
        (["--model", "enormous"], "no model 'enormous'"),
        (["--seconds", "1"], "leave out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_are_one_sentence_and_nothing_is_written(sample, folder, options, words):
    quick = not {"--steps", "--fine-steps", "--seed"} & set(options)
    model = None if "--model" in options else "model"
    refused(sample(folder / "clip.wav", *options, quick=quick, model=model), words)


def test_unknown_options_exit_with_2(sample, folder):
    code, _, err = sample(folder / "clip.wav", "--loudness", "3")
    assert code == 2
    assert "--loudness" in err
    assert not Path("vamped").exists()


def test_no_input_at_all(sample):
    refused(sample(), "give an audio file, or --seconds")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.wav", None, "there is no file missing.wav"),
        ("text.wav", b"this is no audio\n" * 10, "text.wav cannot be read as audio"),
        ("song.vnt", b"VNT\x01", "make audio of it with vampnet decompress"),
        ("empty.wav", b"", "empty.wav is empty"),
        ("short.wav", np.zeros(160), "short.wav: the audio lasts only 0.020 s"),
        ("headers.wav", np.zeros(0), "headers.wav has no samples"),
        ("nan.wav", np.full(8000, np.nan), "not finite"),
        ("text.npz", b"no zip file", "not a token file"),
        ("missing.npz", None, "there is no file missing.npz"),
    ],
)
def test_bad_inputs_are_one_sentence_and_nothing_is_written(sample, folder, name, content, words):
    if isinstance(content, bytes):
        Path(name).write_bytes(content)
    elif content is not None:
        soundfile.write(name, content, RATE, "FLOAT")
    refused(sample(name), words)
    refused(sample(folder / "clip.wav", name), words)  # nor for the good one beside it


def test_unwritable_outputs_are_refused_before_the_work(sample, folder, monkeypatch):
    monkeypatch.setattr(pipeline, "encode", lambda *_, **__: pytest.fail("work was done"))
    Path("file").write_text("in the way")
    for output in ("file", "file/inside"):
        refused(sample(folder / "clip.wav", "-o", output), "cannot be written to")
    if Path("/proc/self").exists():
        refused(sample(folder / "clip.wav", "-o", "/proc/vamped"), "cannot be written to")
    Path("vamped/clip_1.wav").mkdir(parents=True)
    code, _, err = sample(folder / "clip.wav", "--overwrite")
    assert code == 2
    assert "is a folder" in err


def test_inputs_whose_results_would_collide_are_refused(sample, folder):
    Path("clip.wav").write_bytes((folder / "clip.wav").read_bytes())
    refused(sample(folder / "clip.wav", "clip.wav"), "two inputs are called clip")


@pytest.mark.parametrize("name", ["config.json", "coarse.safetensors", "codec.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damaged_models_are_refused(sample, folder, tmp_path, name, damage):
    model = tmp_path / "damaged"
    model.mkdir()
    for path in (folder / "model").iterdir():
        data = path.read_bytes()
        if path.name != name:
            (model / path.name).write_bytes(data)
        elif damage == "truncated":
            (model / path.name).write_bytes(data[: len(data) // 2])
    refused(sample(folder / "clip.wav", model=model), name)


# Unusual audio


@pytest.mark.parametrize(
    ("rate", "channels", "encoding", "name"),
    [
        (192_000, 1, "PCM_24", "a.wav"),
        (8000, 8, "PCM_16", "a.wav"),
        (11_025, 1, "PCM_U8", "a.wav"),
        (44_100, 2, "PCM_16", "a.flac"),
        (48_000, 2, "VORBIS", "a.ogg"),
    ],
)
def test_unusual_audio_works(sample, without_pictures, rate, channels, encoding, name):
    time_ = np.arange(round(0.64 * rate))[:, None] / rate
    soundfile.write(name, 0.1 * np.sin(2000 * time_ + np.arange(channels)), rate, encoding)
    code, out, _ = sample(name)
    assert code == 0
    assert ("mixed to mono" in out) == (channels > 1)
    samples, _ = soundfile.read("vamped/a_1.wav")
    assert abs(len(samples) - 0.64 * RATE) <= 1


def test_silence_works(sample):
    soundfile.write("silence.wav", np.zeros(5120), RATE)
    code, out, _ = sample("silence.wav", "--onset", "2", "--beat", "0.1")
    assert code == 0
    assert "no onsets found in silence.wav" in out
    assert "no beats found in silence.wav" in out


def test_stereo_keeps_two_channels(sample, folder, without_pictures):
    assert sample(folder / "wide.wav", "--stereo", "--periodic", "2")[0] == 0
    assert soundfile.read("vamped/wide_1.wav")[0].shape == (5120, 2)


def test_kept_codebooks_are_all_kept_beside_a_period():
    """Though a period alone generates all codebooks from the fourth on."""
    assert Prompt(periodic=7).first_generated_codebook == 4
    assert Prompt(periodic=7, keep_codebooks=6).first_generated_codebook == 6
    mask = Prompt(periodic=7, keep_codebooks=6).mask((8, 30), jax.random.key(0), frame_rate=125)
    assert not mask[:6].any()
    assert mask[6:].all()


def test_options_that_would_do_nothing_are_refused(sample, folder, without_pictures):
    np.save("mask.npy", np.ones(80, bool))
    clip = folder / "clip.wav"
    words = "--dropout generates some of the frames that are kept"
    refused(sample(clip, "--mask", "mask.npy", "--dropout", "0.9"), words)
    refused(sample(clip, "--region", "0.1:0.2", "--dropout", "0.9"), words)
    assert sample(clip, "--preset", "large-variation", "--periodic", "0")[0] == 0
    assert sample(clip, "--tokens", "-o", "tokens")[0] == 0
    refused(
        sample("tokens/clip_1.npz", "--stereo", "-o", "out"), "--stereo needs audio", Path("out")
    )


def test_a_clip_that_is_too_short_is_named(sample, folder):
    clips = (folder / "clip.wav", folder / "brief.wav")
    refused(sample(*clips, "--prefix", "0.5"), f"{folder}/brief.wav: --prefix is 0.5 s")


def test_a_prompt_that_keeps_everything_is_noted(sample, folder, without_pictures):
    code, out, _ = sample(folder / "brief.wav", "--prefix", "0.2", "--suffix", "0.2")
    assert code == 0
    assert "nothing is new but the codec" in out


def test_masks_fit_the_frames_of_a_token_file(sample, folder, without_pictures):
    """Of which a stretched one has more than its length in samples needs."""
    audio, rate = soundfile.read(folder / "brief.wav")
    soundfile.write("odd.wav", audio[:1300], rate)  # 20 frames of 64 samples and a part
    assert sample("odd.wav", "--stretch", "3", "--tokens", "-o", "tokens")[0] == 0
    clip = tokens.read(Path("tokens/odd_1.npz"))
    assert clip.tokens.shape[-1] == 63 > -(-clip.n_samples // 64)
    np.save("mask.npy", np.ones(63, bool))
    assert sample("tokens/odd_1.npz", "--mask", "mask.npy", "-o", "out")[0] == 0
    np.save("mask.npy", np.ones(61, bool))
    result = sample("tokens/odd_1.npz", "--mask", "mask.npy", "-o", "again")
    refused(result, "needs (8, 63)", Path("again"))
