"""`vampnet sample`, the same as `python sample.py`: audio in, variations out.

Everything that can be checked is checked before anything is computed, and what is computed is
written into a hidden folder beside its destination and moved there when a variation is complete.
"""

import dataclasses
import functools
import json
import secrets
import time
from pathlib import Path
from typing import Any

from codec_bridge.audio import Audio, apply_gain, read, write
from codec_bridge.errors import InputError
from codec_bridge.hashes import file_hash
from vampnet_jax import devices, figures, pipeline, placement, tokens
from vampnet_jax.cli.naming import named_as_options
from vampnet_jax.cli.progress import StageBars
from vampnet_jax.cli.results import (
    Record,
    Results,
    environment,
    read_record,
    recorded_file,
    run_interruptibly,
    write_record,
)
from vampnet_jax.cli.sample_options import (
    ARGUMENTS,
    NOT_RECORDED,
    RECORDED,
    Options,
    as_arguments,
    check_from_nothing,
    edit_of,
    parse,
    prompt_of,
    sampling_of,
    with_defaults_of,
)
from vampnet_jax.pipeline import Clip, Edit, Variations
from vampnet_jax.prompts import Prompt
from vampnet_jax.release import Model, load, resolve
from vampnet_jax.sampling import SamplingOptions

say = functools.partial(print, flush=True)
FROM_NOTHING = "from-nothing"
"""Stem of the files that are made without an input."""
MAX_VARIATIONS = 1000
"""They are made as one batch."""


def main(argv: list[str]) -> int:
    """Run the command; InputError for what a person got wrong."""
    options = parse(argv)
    record = None
    if options.from_params is not None:
        options, record = _repeated(options)
    job = _checked(options)
    if record is not None:
        _check_meaning(job, record)
    _keep_inputs(job, Path(options.output))
    results = Results(options.output, job.all_names(), overwrite=options.overwrite)
    with results:
        run_interruptibly(lambda: _run(job, record, results), results.discard)
    return 0


def _keep_inputs(job: "Job", folder: Path) -> None:
    """Refuse to replace an input of this very run, --overwrite or not."""
    inputs = {source.path.resolve() for source in job.sources if source.path is not None}
    for name in job.all_names():
        if (folder / name).resolve() in inputs:
            raise InputError(
                f"{folder / name} is an input and would be replaced; choose another folder with -o."
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """One input, found to be in order."""

    path: Path | None
    """None: from nothing."""
    clip: tokens.TokenFile | None = None
    """Read already if it is a token file."""
    length: tuple[int, int] = (0, 1)
    """Samples and sampling rate."""
    recording: Audio | None = None
    """Kept if there is but one input; others are read again, so that a long list does not fill the
    memory."""

    @property
    def stem(self) -> str:
        return FROM_NOTHING if self.path is None else self.path.stem


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A command line that has been checked."""

    options: Options
    sources: list[Source]
    prompt: Prompt
    coarse: SamplingOptions
    fine: SamplingOptions
    edit: Edit
    seed: int

    def names(self, source: Source, index: int) -> list[str]:
        """Files of one variation; the sound comes last, so that it is never there alone."""
        endings = (".json", ".png", ".npz" if self.options.tokens else ".wav")
        return [f"{source.stem}_{index + 1}{ending}" for ending in endings]

    def all_names(self) -> list[str]:
        """Files of all variations of all inputs."""
        indices = range(self.options.num_samples)
        return [name for source in self.sources for i in indices for name in self.names(source, i)]


def _run(job: Job, record: Record | None, results: Results) -> None:
    options = job.options
    devices.keep_compiled_programs()
    with named_as_options(subjects=("device",)):
        found = devices.select(options.device)
    model = load(options.model, codec_device=devices.of_codec(options.device))
    identity = {"name": model.name, **model.fingerprints}
    if record is not None and _weights(identity) != _weights(record.model):
        raise InputError(
            f"the model {options.model} has other weights than the one {options.from_params} was "
            "made with; give the same model to repeat it."
        )
    _check_against_model(job, model)
    if options.dtype is not None:
        model = model.computing_in(options.dtype)
    if options.mesh is not None:
        with named_as_options(subjects=("mesh",)):
            mesh = placement.mesh_of(options.mesh, model.coarse.config, found)
        model = placement.divide(model, mesh)
    say(f"seed {job.seed}, model {model.name}, prompt {job.prompt.describe()}")
    with StageBars() as bars:
        for source in job.sources:
            start = time.perf_counter()
            clip = None
            if source.clip is not None:
                clip = Clip(source.clip.tokens, source.clip.n_samples, source.clip.gain_db)
            elif source.path is not None:
                audio = source.recording or _read_audio(source.path)
                left = min(audio.channels, 2) if options.stereo else 1
                if audio.channels > left:
                    to = "stereo" if options.stereo else "mono"
                    say(f"note: the {audio.channels} channels of {source.path} are mixed to {to}")
                clip = pipeline.encode(
                    model, audio, stereo=options.stereo, pitch=options.pitch, on_progress=bars
                )
            edit = job.edit
            if options.mask is not None and clip is not None:
                mask = tokens.read_mask(options.mask, *clip.tokens.shape[1:])
                edit = dataclasses.replace(edit, mask=mask)
            made = pipeline.generate(
                model, clip, job.prompt, seed=job.seed, n_variations=options.num_samples,
                coarse=job.coarse, fine=job.fine, edit=edit, on_progress=bars,
            )  # fmt: skip
            for sort in made.unheard:
                say(
                    f"note: no {sort} found in {source.path}; that part of the prompt keeps nothing"
                )
            if source.path is not None and not made.replaced.any():
                say(f"note: the prompt keeps all of {source.path}; nothing is new but the codec")
            content = _record(job, source, model, identity)
            for index in range(options.num_samples):
                _write(job, source, model, clip, made, index, content, results, bars)
            seconds = options.num_samples * made.n_samples / model.codec.sample_rate
            say(f"{seconds:.1f} s of music in {time.perf_counter() - start:.1f} s")


def _write(
    job: Job,
    source: Source,
    model: Model,
    clip: Clip | None,
    made: Variations,
    index: int,
    record: dict[str, Any],
    results: Results,
    bars: StageBars,
) -> None:
    """One variation: sound or tokens, picture, record."""
    names = job.names(source, index)
    record_path, picture, result = (results.staging / name for name in names)
    rate = model.codec.sample_rate
    before = after = None
    if job.options.tokens:
        clip_out = tokens.TokenFile(
            made.tokens[index], model.codec.fingerprint, rate, model.codec.hop_length,
            made.n_samples, made.gain_db,
        )  # fmt: skip
        tokens.write(result, clip_out)
    else:
        n = job.options.num_samples
        audio = pipeline.decode(
            model, made, index,
            lambda stage, done, total: bars(stage, index * total + done, n * total),
        )  # fmt: skip
        write(result, audio)
        after = audio.samples.mean(axis=0)
        if clip is not None and clip.audio is not None:
            before = apply_gain(clip.audio, -clip.gain_db)[0].samples.mean(axis=0)
    write_record(record_path, record | {"variation": index + 1})
    figures.draw_variation(
        picture,
        title=f"{source.stem}, variation {index + 1} of {job.options.num_samples} "
        f"(model {model.name}, seed {job.seed})",
        tokens=made.prompts[0],
        mask=made.mask[index],
        frame_rate=model.codec.frame_rate,
        before=before,
        after=after,
        sample_rate=rate,
    )
    results.commit(names)
    say(results.folder / names[-1])


def _record(job: Job, source: Source, model: Model, identity: dict[str, str]) -> dict[str, Any]:
    """Everything that decides a result, ready for JSON."""

    def file(path: Path | None) -> dict[str, str] | None:
        return None if path is None else {"path": str(path.absolute()), "sha256": file_hash(path)}

    values = {name: getattr(job.options, name) for name in RECORDED} | {"seed": job.seed}
    if Path(job.options.model).is_dir():
        values["model"] = str(resolve(job.options.model).absolute())
    if job.options.mask is not None:
        values["mask"] = str(job.options.mask.absolute())
    return {
        "options": values,
        "input": file(source.path),
        "mask": file(job.options.mask),
        "model": identity,
        "prompt": dataclasses.asdict(job.prompt),
        "coarse": dataclasses.asdict(job.coarse),
        "fine": dataclasses.asdict(job.fine),
        "environment": environment(),
    }


def _check_meaning(job: Job, record: Record) -> None:
    """Raise InputError if the same options mean something else than when the record was made."""
    now = {name: dataclasses.asdict(getattr(job, name)) for name in record.meant}
    now = json.loads(json.dumps(now))  # which has lists where there were tuples
    differing = [name for name, then in record.meant.items() if now[name] != then]
    if differing:
        raise InputError(
            f"{job.options.from_params} cannot be repeated: this version or this model understands "
            f"its options otherwise ({' and '.join(differing)})."
        )


def _repeated(options: Options) -> tuple[Options, Record]:
    """The options of an earlier run with this one's inputs, output and device."""
    path = options.from_params
    assert path is not None
    own: dict[str, Any] = {name: getattr(options, name) for name in NOT_RECORDED}
    if dataclasses.replace(options, model=Options.model) != Options(**own):
        raise InputError(
            "--from-params repeats an earlier run with all its options; only INPUT, -o, "
            "--overwrite, --device, --mesh and --model go with it."
        )
    record = read_record(path)
    if set(record.options) != set(RECORDED):
        odd = sorted(set(record.options) ^ set(RECORDED))
        raise InputError(f"{path} has other options than this version: {', '.join(odd)}.")
    if not options.input and record.input is not None:
        own["input"] = (recorded_file(path, record.input),)
    if record.mask is not None:
        recorded_file(path, record.mask)
    if options.model != Options.model:
        own["model"] = options.model
    return dataclasses.replace(parse(as_arguments(record.options)), **own), record


def _checked(options: Options) -> Job:
    """Check everything that can be checked before the model is loaded."""
    if not 1 <= options.num_samples <= MAX_VARIATIONS:
        raise InputError(
            f"--num-samples is {options.num_samples}; it must be from 1 to {MAX_VARIATIONS}."
        )
    if options.seed is not None and not 0 <= options.seed < 2**32:
        raise InputError(f"--seed is {options.seed}; it must be from 0 to {2**32 - 1}.")
    if not -12 <= options.pitch <= 12:
        raise InputError(f"--pitch is {options.pitch:g}; it must be from -12 to 12 semitones.")
    options = with_defaults_of(resolve(options.model), options)
    coarse, fine = sampling_of(options, ""), sampling_of(options, "fine_")
    prompt = prompt_of(options)
    if options.seconds is None:
        if not options.input:
            raise InputError("give an audio file, or --seconds to make music from nothing.")
        sources = [_source(path, options, prompt) for path in options.input]
    else:
        check_from_nothing(options)
        sources = [Source(None)]
    edit = edit_of(options)
    stems = [source.stem for source in sources]
    twice = next((stem for stem in stems if stems.count(stem) > 1), None)
    if twice is not None:
        raise InputError(f"two inputs are called {twice}, as their results would be; rename one.")
    seed = secrets.randbelow(2**32) if options.seed is None else options.seed
    return Job(options, sources, prompt, coarse, fine, edit, seed)


def _source(path: Path, options: Options, prompt: Prompt) -> Source:
    if path.suffix == ".npz":
        if options.pitch:
            raise InputError(f"--pitch needs audio, and {path} holds tokens.")
        if options.stereo:
            raise InputError(
                f"--stereo needs audio; {path} holds tokens, which keep their channels."
            )
        clip = tokens.read(path)
        _check_duration(path, prompt, clip.n_samples / clip.sample_rate)
        return Source(path, clip, (clip.n_samples, clip.sample_rate))
    if path.suffix == ".vnt":
        raise InputError(f"{path} is a compressed file; make audio of it with vampnet decompress.")
    audio = _read_audio(path)
    _check_duration(path, prompt, audio.seconds)
    length = (audio.samples.shape[1], audio.rate)
    return Source(path, None, length, audio if len(options.input) == 1 else None)


def _check_duration(path: Path, prompt: Prompt, seconds: float) -> None:
    try:
        with named_as_options(ARGUMENTS):
            prompt.check_duration(seconds)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _read_audio(path: Path) -> Audio:
    audio = read(path)
    try:
        pipeline.check_recording(audio)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return audio


def _check_against_model(job: Job, model: Model) -> None:
    """What depends on the model: token files, and codebooks that must exist."""
    n_codebooks = pipeline.n_codebooks(model)
    for source in job.sources:
        if source.clip is not None and source.path is not None:
            source.clip.check(source.path, model.codec, n_codebooks)
        if job.options.mask is not None:
            n_frames = pipeline.frames_of_recording(model, *source.length)
            if source.clip is not None:
                n_frames = source.clip.tokens.shape[-1]
            tokens.read_mask(job.options.mask, n_codebooks, n_frames)
    for name in ("keep_codebooks", "upper_codebooks"):
        value = getattr(job.options, name)
        if value is not None and value > n_codebooks:
            raise InputError(
                f"--{name.replace('_', '-')} is {value}; the model {model.name} has {n_codebooks} "
                "codebooks."
            )
    for prefix, sampling, stage in (
        ("", job.coarse, model.coarse),
        ("fine_", job.fine, model.fine),
    ):
        with named_as_options(ARGUMENTS, prefix=prefix):
            sampling.check(stage.config)


def _weights(identity: dict[str, str]) -> dict[str, str]:
    return {part: identity.get(part, "") for part in ("coarse", "fine", "codec")}
