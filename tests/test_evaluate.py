"""`vampnet evaluate`: the figures are those of the measures, and resuming does not change them."""

import csv
import dataclasses
import itertools
import json
import sys

import numpy as np
import pytest
import soundfile
from small_codecs import random_codec
from small_models import random_model

from codec_bridge.errors import InputError
from vampnet_jax import cli
from vampnet_jax.compression.compressor import Compressor
from vampnet_jax.compression.container import HEADER_BYTES
from vampnet_jax.evaluation.conditions import (
    Condition,
    baselines,
    paper_experiments,
    read_experiments,
)
from vampnet_jax.evaluation.excerpts import choose_excerpts
from vampnet_jax.evaluation.intervals import Interval
from vampnet_jax.evaluation.report import tables
from vampnet_jax.evaluation.run import evaluate
from vampnet_jax.evaluation.summary import Result
from vampnet_jax.prompts import Prompt

RATE = 8000


@pytest.fixture(scope="module")
def music(tmp_path_factory):
    """Three recordings of 4 s of tones that come and go."""
    folder = tmp_path_factory.mktemp("music")
    rng = np.random.default_rng(0)
    t = np.arange(4 * RATE) / RATE
    for i in range(3):
        sound = np.sin(2 * np.pi * (200 + 150 * i) * t) * (0.3 + 0.2 * np.sin(7 * t))
        soundfile.write(folder / f"{i}.wav", sound + 0.01 * rng.standard_normal(len(t)), RATE)
    (folder / "notes.txt").write_text("not audio")
    (folder / "broken.wav").write_text("not audio either")
    return folder


CONDITIONS = [
    Condition("baselines", "codec", "codec"),
    Condition("baselines", "random tokens", "random"),
    Condition("baselines", "Opus", "opus", kbps=6),
    Condition("own", "p=2", prompt=Prompt(periodic=2, upper_codebooks=2), sampling=(("steps", 2),)),
    Condition("own", "everything kept", prompt=Prompt(periodic=1), sampling=(("steps", 2),)),
    Condition("own", "file", "compress", codebooks=1, period=4, sampling=(("steps", 2),)),
]


@pytest.mark.parametrize("count", [2, 5, 6, 12])
def test_excerpts_are_spread_evenly_and_neither_overlap_nor_leave_a_file(music, count):
    excerpts = choose_excerpts(music, count, 1.0)
    assert len(excerpts) == count
    by_file = [[e.start for e in excerpts if e.path.stem == str(i)] for i in range(3)]
    numbers = [len(starts) for starts in by_file]
    assert max(numbers) - min(numbers) <= 1
    for starts in by_file:
        assert all(b - a >= RATE for a, b in itertools.pairwise(starts))
        assert all(0 <= start <= 3 * RATE for start in starts)
    assert excerpts[0].read(RATE).shape == (RATE,)


def test_recordings_that_are_too_few_or_too_short_are_refused(music):
    with pytest.raises(InputError, match=r"room for 12 excerpts of 1 s .* 13 are needed"):
        choose_excerpts(music, 13, 1.0)
    with pytest.raises(InputError, match=r"no recording of 9 s or more \(4 audio files\)"):
        choose_excerpts(music, 2, 9.0)
    with pytest.raises(InputError, match="is not a folder"):
        choose_excerpts(music / "0.wav", 2, 1.0)


@pytest.mark.slow
def test_an_evaluation_gives_all_figures_and_the_same_again_after_an_interruption(music, tmp_path):
    compressor = Compressor(random_model(random_codec()))
    out = tmp_path / "evaluation"
    options = {"n_excerpts": 5, "seconds": 1.0, "n_listen": 1}
    calls = []

    def stop_late(stage, done, total):
        calls.append(stage)
        if stage == "p=2" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(compressor, music, out, CONDITIONS, on_progress=stop_late, **options)
    assert not (out / "report.html").exists()
    results = evaluate(compressor, music, out, CONDITIONS, **options)
    whole = evaluate(compressor, music, tmp_path / "again", CONDITIONS, **options)
    assert results == whole
    for name in ("results.csv", "results.json", "results.md", "report.html"):
        assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()

    figures = {r.condition.name: r.figures for r in results}
    assert figures["everything kept"]["mel"] == pytest.approx(figures["codec"]["mel"], abs=1e-4)
    assert figures["codec"]["bitrate"].value == pytest.approx(125 * 8 * 6)
    file_bits = 8 * (HEADER_BYTES + 32 * 6 / 8)  # 32 of 125 frames, 6 bits each
    assert figures["file"]["bitrate"].value == pytest.approx(file_bits, abs=64)
    assert figures["everything kept"]["share mel-statistics"].value == pytest.approx(0, abs=1e-3)
    assert 0 <= figures["p=2"]["token accuracy"].value < 0.2
    assert "token diversity" in figures["p=2"]

    with open(out / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["condition"] for row in rows] == [c.name for c in CONDITIONS]
    content = json.loads((out / "results.json").read_text())
    uniform = np.log(64)
    assert content["tokens"]["coarse/nll/1"][0] == pytest.approx(uniform, rel=0.3)
    page = (out / "report.html").read_text()
    for player in ("original-0", f"{CONDITIONS[3].slug}-0"):
        assert f"audio/{player}.flac" in page
        assert (out / "audio" / f"{player}.flac").is_file()
    assert {"baselines.png", "own.png", "bitrate.png"} <= {p.name for p in out.glob("*.png")}

    frechet = figures["p=2"]["frechet mel-statistics"].value
    ends = [figures[name]["frechet mel-statistics"].value for name in ("codec", "random tokens")]
    share = (frechet - ends[0]) / (ends[1] - ends[0])
    assert figures["p=2"]["share mel-statistics"].value == pytest.approx(share)
    change = figures["everything kept"]["mel"].value - figures["p=2"]["mel"].value
    assert figures["everything kept"]["mel change"].value == pytest.approx(change)
    assert "mel change" not in figures["p=2"]

    with pytest.raises(InputError, match="with other seed"):
        evaluate(compressor, music, out, CONDITIONS, seed=1, **options)
    with pytest.raises(InputError, match="holds no evaluation"):
        evaluate(compressor, music, music, CONDITIONS, **options)


def test_each_excerpt_is_encoded_once_whatever_is_made_of_it(music, tmp_path, monkeypatch):
    compressor = Compressor(random_model(random_codec()))
    codec, encoded = compressor.model.codec, []
    encode = codec.encode
    monkeypatch.setattr(codec, "encode", lambda audio: encoded.append(len(audio)) or encode(audio))
    options = {"n_excerpts": 2, "seconds": 0.5, "n_listen": 0}
    evaluate(compressor, music, tmp_path / "out", CONDITIONS[:2], **options)
    assert encoded == [2]
    evaluate(compressor, music, tmp_path / "out", CONDITIONS[:3], **options)
    assert encoded == [2]  # Opus needs no tokens, and the rest has been kept


def test_a_model_that_is_best_sampled_codebook_by_codebook_can_be_resumed(music, tmp_path):
    model = random_model(random_codec())
    sampling = model.coarse_sampling.changed(codebook_steps=(2, 1))
    compressor = Compressor(dataclasses.replace(model, coarse_sampling=sampling))
    options = {"n_excerpts": 2, "seconds": 0.5, "n_listen": 0}
    first = evaluate(compressor, music, tmp_path / "out", CONDITIONS[:1], **options)
    assert evaluate(compressor, music, tmp_path / "out", CONDITIONS[:1], **options) == first


@pytest.mark.parametrize(
    ("condition", "problem"),
    [
        (Condition("own", "x", "codec", codebooks=9), "own, x: codebooks is 9; the model has 8"),
        (Condition("own", "x", "compress", period=256), "period is 256"),
        (Condition("own", "x", prompt=Prompt(prefix=2.0)), "prefix is 2 s but the clip lasts"),
        (Condition("own", "x", prompt=Prompt(prefix=0.5, suffix=0.5)), "keep all of the excerpts"),
        (Condition("own", "x", sampling=(("codebook_steps", (1,)),)), "codebook_steps has 1"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_work(music, tmp_path, condition, problem):
    with pytest.raises(InputError, match=problem):
        evaluate(
            Compressor(random_model(random_codec())), music, tmp_path / "out", [condition],
            n_excerpts=2, seconds=1.0,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_kept_measurements_of_another_version_are_not_continued(music, tmp_path, monkeypatch):
    compressor = Compressor(random_model(random_codec()))
    options = {"n_excerpts": 2, "seconds": 0.5, "n_listen": 0}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".left-by-a-kill").touch()  # is no reason to refuse the folder
    evaluate(compressor, music, tmp_path / "out", CONDITIONS[:1], **options)
    monkeypatch.setattr("vampnet_jax.evaluation.run.MEASURES", 99)
    with pytest.raises(InputError, match="with other measures"):
        evaluate(compressor, music, tmp_path / "out", CONDITIONS[:1], **options)


def test_an_embedding_that_is_not_installed_is_refused_before_the_work(
    music, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "torchcrepe", None)
    compressor = Compressor(random_model(random_codec()))
    with pytest.raises(InputError, match="needs torchcrepe"):
        evaluate(
            compressor, music, tmp_path / "out", CONDITIONS, n_excerpts=2, seconds=0.5,
            embeddings=("crepe-tiny",),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_the_papers_experiments_and_baselines_have_names_of_their_own():
    conditions = [*baselines(), *(c for rows in paper_experiments(4, 16).values() for c in rows)]
    assert len({c.slug for c in conditions}) == len(conditions)
    assert {
        "1 steps", "72 steps", "4 codebooks, p=16", "codec, 8 codebooks", "Opus 6 kbit/s",
        "beat 75 ms", "nothing kept",
    } <= {c.name for c in conditions}  # fmt: skip


def test_tables_show_figures_with_intervals_and_leave_out_what_is_not_there():
    results = [
        Result(Condition("baselines", "codec", "codec"), {"mel": Interval(0.61234, 0.6, 0.63)}),
        Result(
            Condition("own", "p=2"),
            {
                "clicks": Interval(1, 1, 1),
                "mel": Interval(1, 0.9, 1.1),
                "frechet x": Interval(2, 1, 3),
            },
        ),
        Result(Condition("own", "file", "compress"), {"bitrate": Interval(4000.4, 4000.4, 4000.4)}),
    ]
    assert tables(results) == (
        "| baselines | mel |\n|---|---|\n| codec | 0.612 [0.6, 0.63] |\n\n"
        "| own | bitrate | mel | frechet x |\n|---|---|---|---|\n"
        "| p=2 |  | 1 [0.9, 1.1] | 2 [1, 3] |\n| file | 4000 |  |  |\n"
    )


def test_own_experiments_are_read_from_yaml(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(
        "experiments:\n  mine:\n    - {name: a, periodic: 5, steps: 12, temperature: 0.8}\n"
        "    - {name: b, kind: compress, codebooks: 2, period: 3}\n"
        "    - {name: c, regions: [[1, 2.5]]}\n"
    )
    a, b, c = read_experiments(path)["mine"]
    assert (a.prompt.periodic, dict(a.sampling)) == (5, {"steps": 12, "temperature": 0.8})
    assert (b.kind, b.codebooks, b.period) == ("compress", 2, 3)
    assert c.prompt.regions == ((1.0, 2.5),)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("experiments: [1", "is not YAML"),
        ("other: 3", "has no `experiments:`"),
        ("experiments: {a: []}", "has no `experiments:`"),
        ("experiments: {a: [{periodic: 3}]}", "has no `name:`"),
        ("experiments: {a: [{name: x, kind: magic}]}", "there is no kind 'magic'"),
        ("experiments: {a: [{name: x, peridoic: 3}]}", "has no option 'peridoic'"),
        ("experiments: {a: [{name: x, kind: opus, period: 3}]}", "has no option 'period'"),
        ("experiments: {a: [{name: x, periodic: -1}]}", "must be at least 0"),
        ("experiments: {a: [{name: x, periodic: 2.5}]}", "periodic is 2.5; it must be a whole"),
        ("experiments: {a: [{name: x, prefix: long}]}", "prefix is 'long'; it must be a number"),
        ("experiments: {a: [{name: x}, {name: x, periodic: 3}]}", "two conditions named 'x'"),
        ("experiments: {a: [{name: x, steps: many}]}", "steps is 'many'; it must be a number"),
        ("experiments: {a: [{name: x, steps: }]}", "steps is None; it must be a whole number"),
        ("experiments: {bitrate: [{name: x}]}", "bitrate.png, would replace another"),
        ("experiments: {a b: [{name: x}], a-b: [{name: x}]}", "a-b.png, would replace another"),
        ("experiments: {a: [{name: x, steps: 0}]}", "must be a whole number of at least 1"),
        ("experiments: {a: [{name: x, kind: compress, codebooks: 0}]}", "must be at least 1"),
        ("experiments: {a: [{name: x, kind: compress, period: 2.5}]}", "must be a whole number"),
        ("experiments: {a: [{name: x, kind: opus, kbps: .nan}]}", "kbps is nan"),
        ("experiments: {a: [{name: x, regions: 3}]}", "in experiment 'a', condition 'x'"),
        ("experiments: {a: [!!python/object/apply:os.system [ls]]}", "is not YAML"),
    ],
)
def test_bad_experiments_are_named(tmp_path, text, problem):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        read_experiments(path)
    assert problem in str(error.value)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["MUSIC/0.wav"], "0.wav is not a folder of recordings"),
        (["MUSIC", "--excerpts", "1"], "--excerpts is 1"),
        (["MUSIC", "--seconds", "0.1"], "--seconds is 0.1"),
        (["MUSIC", "--seed", "-1"], "--seed is -1"),
        (["MUSIC", "--config", "nowhere.yaml"], "nowhere.yaml cannot be read"),
        (["MUSIC", "--model", "nowhere"], "there is no model 'nowhere'"),
    ],
)
def test_bad_options_are_one_sentence_and_nothing_is_written(
    music, tmp_path, words, problem, capsys
):
    argv = [word.replace("MUSIC", str(music)) for word in words]
    with pytest.raises(SystemExit) as caught:
        cli.main(["evaluate", *argv, "-o", str(tmp_path / "out")])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
