"""`vampnet decompress`: a `.vnt` file to audio."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg

from codec_bridge.errors import InputError
from vampnet_jax.cli.compress import one_result, require_constriction
from vampnet_jax.cli.naming import named_as_options
from vampnet_jax.devices import Device


@dataclasses.dataclass(frozen=True)
class DecompressOptions:
    """Make a `.vnt` file sound: decode the tokens that it keeps and generate the others."""

    input: Annotated[Path, Positional, arg(metavar="IN.vnt")]
    """As `vampnet compress` wrote it."""
    output: Annotated[Path, Positional, arg(metavar="OUT")]
    """An audio file to write (.wav, .flac, .ogg, .opus, .mp3), or .npz for tokens."""
    steps: int | None = None
    """Decoding steps of the coarse model (default: as many as the model is best sampled with)."""
    model: str = "tiny"
    """The name or directory of the model that the file was made with."""
    device: Device = "auto"
    """Where the model computes."""
    overwrite: bool = False
    """Replace OUT if it exists."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = tyro.cli(
        DecompressOptions, prog="vampnet decompress", args=argv, config=(FlagCreatePairsOff,)
    )
    if options.steps is not None and options.steps < 1:
        raise InputError(f"--steps is {options.steps}; it must be at least 1.")
    require_constriction()
    from codec_bridge import audio as signal
    from vampnet_jax import devices, pipeline, tokens
    from vampnet_jax.cli.progress import StageBars
    from vampnet_jax.cli.results import run_interruptibly
    from vampnet_jax.compression.compressor import Compressor
    from vampnet_jax.compression.container import read_bytes

    if options.output.suffix not in (".npz", *signal.FORMATS):
        raise InputError(
            f"{options.output} must end in .npz or in one of {', '.join(signal.FORMATS)}."
        )
    results = one_result(options.output, overwrite=options.overwrite)
    data = read_bytes(options.input)

    def work() -> None:
        devices.keep_compiled_programs()
        with named_as_options(subjects=("device",)):
            devices.select(options.device)
        codec_device = devices.of_codec(options.device)
        compressor = Compressor.load(options.model, codec_device=codec_device)
        codec = compressor.model.codec
        try:
            with named_as_options(["with_model"]):
                content = compressor.read(data)
        except InputError as error:
            raise InputError(f"{options.input} cannot be decompressed: {error}") from None
        staged = results.staging / options.output.name
        with StageBars() as bars:
            made = compressor.restore(content, steps=options.steps, on_progress=bars)
            if options.output.suffix == ".npz":
                clip = tokens.TokenFile(
                    made.tokens[0], codec.fingerprint, codec.sample_rate, codec.hop_length,
                    made.n_samples, made.gain_db,
                )  # fmt: skip
                tokens.write(staged, clip)
            else:
                audio = pipeline.decode(compressor.model, made, 0, bars)
                signal.write(staged, audio)
        results.commit([options.output.name])
        header = content.header
        print(
            f"{options.output}: {header.n_samples / codec.sample_rate:.1f} s; "
            f"{content.keep.sum() * header.channels} of {made.tokens.size} tokens were kept"
        )

    with results:
        run_interruptibly(work, results.discard)
    return 0
