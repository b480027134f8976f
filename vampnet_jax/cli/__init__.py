"""The `vampnet` command: finds the module of a sub-command and runs its `main`.

Modules are imported only when their command runs, so that start-up stays short.
"""

import importlib
import sys

from codec_bridge.errors import InputError
from vampnet_jax.cli.status import INTERRUPTED, USER_ERROR, loading, quiet_if_unwritten

COMMANDS = {
    "sample": "audio in, variations out",
    "train": "train a coarse or fine model from a folder of tokens",
    "tokenize": "turn audio files into a folder of tokens",
    "import": "make a model directory from checkpoints or training runs",
    "merge-lora": "put LoRA adapters that were trained into their model",
    "export-torch": "write a model as the original's .pth files",
    "evaluate": "measure how good a model is, on a folder of recordings",
    "compress": "audio to a small file of tokens",
    "decompress": "such a file to audio again",
    "benchmark": "measure how fast a model samples here",
    "download": "fetch the original's published weights",
}
"""Sub-command → what it does; `a-b` lives in the module `vampnet_jax.cli.a_b`."""


@quiet_if_unwritten()
def main(argv: list[str] | None = None) -> None:
    """Entry point of the console script `vampnet`."""
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        sys.exit(0 if args else USER_ERROR)
    if args[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(version("vampnet-jax"))
        sys.exit(0)
    if args[0] not in COMMANDS:
        print(f"error: there is no command {args[0]!r}.\n\n{_usage()}", file=sys.stderr)
        sys.exit(USER_ERROR)
    run(args[0], args[1:])


@quiet_if_unwritten()
def run(command: str, argv: list[str] | None = None) -> None:
    """Run one sub-command and exit with one of `vampnet_jax.cli.status`."""
    module_name = {"import": "import_"}.get(command, command.replace("-", "_"))
    try:
        with loading():
            module = importlib.import_module(f"vampnet_jax.cli.{module_name}")
        status = module.main(sys.argv[1:] if argv is None else argv)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        status = USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = INTERRUPTED
    sys.exit(status)


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "usage: vampnet COMMAND [OPTIONS]   (vampnet COMMAND --help)\n\n" + "\n".join(lines)
