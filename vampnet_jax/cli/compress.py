"""`vampnet compress`: audio to a `.vnt` file."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg

from codec_bridge.errors import InputError
from vampnet_jax.cli.naming import named_as_options
from vampnet_jax.devices import Device

if TYPE_CHECKING:
    from vampnet_jax.cli.results import Results
    from vampnet_jax.compression.compressor import Compressor
    from vampnet_jax.compression.settings import Setting
    from vampnet_jax.pipeline import Clip, Progress


@dataclasses.dataclass(frozen=True)
class CompressOptions:
    """Write music as a small file of tokens; `vampnet decompress` makes it sound again.

    Without --bitrate, --codebooks, --period or --keep all tokens are kept, so the result sounds as
    the codec does. With one of them the model generates what was left out.
    """

    input: Annotated[Path, Positional, arg(metavar="IN")]
    """An audio file."""
    output: Annotated[Path, Positional, arg(metavar="OUT.vnt")]
    """The file to write."""
    bitrate: float | None = None
    """Try what fits into this many bits per second, header included, and take the best."""
    codebooks: int | None = None
    """Keep this many of the codebooks, the first ones (default: all)."""
    period: int | None = None
    """Keep every n-th frame (default: 1, every one)."""
    keep: float | None = None
    """Keep this share (0 to 1) of the coarse model's tokens: those that it cannot guess."""
    with_model: bool = False
    """Code under the model's own probabilities: smaller and slower, and only machines that round
    alike can read it."""
    stereo: bool = False
    """Keep two channels apart instead of mixing to mono."""
    seed: int = 0
    """Of what is generated when the file is decompressed; kept in the file."""
    model: str = "tiny"
    """A model's name or directory; both ends need the same."""
    device: Device = "auto"
    """Where the model computes."""
    overwrite: bool = False
    """Replace OUT if it exists."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = tyro.cli(
        CompressOptions, prog="vampnet compress", args=argv, config=(FlagCreatePairsOff,)
    )
    check(options)
    require_constriction()
    from codec_bridge import audio as signal
    from vampnet_jax import devices, pipeline
    from vampnet_jax.cli.progress import StageBars
    from vampnet_jax.cli.results import run_interruptibly
    from vampnet_jax.compression.compressor import Compressor

    results = one_result(options.output, overwrite=options.overwrite)
    audio = signal.read(options.input)
    pipeline.check_recording(audio)

    def work() -> None:
        devices.keep_compiled_programs()
        with named_as_options(subjects=("device",)):
            devices.select(options.device)
        codec_device = devices.of_codec(options.device)
        compressor = Compressor.load(options.model, codec_device=codec_device)
        with StageBars() as bars:
            clip = pipeline.encode(compressor.model, audio, stereo=options.stereo, on_progress=bars)
            with named_as_options(["bitrate"], subjects=["codebooks", "period"]):
                result = _compressed(options, compressor, clip, bars)
        (results.staging / options.output.name).write_bytes(result.data)
        results.commit([options.output.name])
        seconds = clip.n_samples / compressor.model.codec.sample_rate
        print(
            f"{options.output}: {len(result.data)} bytes for {seconds:.1f} s, "
            f"{8 * len(result.data) / seconds:.0f} bit/s; kept {result.kept}"
        )

    with results:
        run_interruptibly(work, results.discard)
    return 0


def _compressed(
    options: CompressOptions, compressor: "Compressor", clip: "Clip", on_progress: "Progress"
) -> "Setting":
    """With the setting that was asked for."""
    from vampnet_jax.compression.settings import compress_with, compress_within

    if options.bitrate is not None:
        return compress_within(
            compressor, clip, options.bitrate, seed=options.seed, with_model=options.with_model,
            on_progress=on_progress,
        )  # fmt: skip
    return compress_with(
        compressor, clip, codebooks=options.codebooks, period=options.period, share=options.keep,
        seed=options.seed, with_model=options.with_model,
    )  # fmt: skip


def check(options: CompressOptions) -> None:
    """Raise InputError for options that do not work, before anything is read."""
    if options.output.suffix != ".vnt":
        raise InputError(f"{options.output} must end in .vnt.")
    ways = {
        "--bitrate": options.bitrate is not None,
        "--keep": options.keep is not None,
        "--codebooks and --period": options.codebooks is not None or options.period is not None,
    }
    given = [name for name, is_given in ways.items() if is_given]
    if len(given) > 1:
        raise InputError(f"{given[0]} and {given[1]} exclude each other; give one of them.")
    if options.bitrate is not None and not 0 < options.bitrate < float("inf"):
        raise InputError(f"--bitrate is {options.bitrate:g}; it must be above 0 bits per second.")
    if options.keep is not None and not 0 < options.keep < 1:
        raise InputError(f"--keep is {options.keep:g}; it must be between 0 and 1.")
    if not 0 <= options.seed < 2**32:
        raise InputError(f"--seed is {options.seed}; it must be from 0 to {2**32 - 1}.")


def one_result(path: Path, *, overwrite: bool) -> "Results":
    """Where one file will be written; InputError, before the work, if it cannot be."""
    from vampnet_jax.cli.results import Results

    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; choose another name, or replace it with --overwrite.")
    return Results(path.parent, [path.name], overwrite=overwrite)


def require_constriction() -> None:
    """Raise InputError where the entropy coder is not installed."""
    try:
        import constriction  # noqa: F401
    except ImportError:
        raise InputError(
            "this command needs the package constriction, which has no ready-made build for Linux "
            "on ARM; with Rust installed, pip install 'constriction>=0.5,<0.6' builds it."
        ) from None
