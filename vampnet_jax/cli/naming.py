"""What the library calls an argument, the command line calls an option."""

import contextlib
import re
from collections.abc import Iterable, Iterator

from codec_bridge.errors import InputError


@contextlib.contextmanager
def named_as_options(
    names: Iterable[str] = (), *, subjects: Iterable[str] = (), prefix: str = ""
) -> Iterator[None]:
    """A context in which the library's errors call its arguments as the command line does.

    Args:
      names: arguments, wherever an error names them: `beat_every` becomes `--beat-every`.
      subjects: arguments whose names are ordinary words too; only where the error begins with one
        and says what it is or has: `seed is -1; …`.
      prefix: of the options of one stage: with "fine_", `top_k` becomes `--fine-top-k`.
    """
    try:
        yield
    except InputError as error:
        anywhere, first = ("|".join(map(re.escape, words)) or "(?!)" for words in (names, subjects))
        text = re.sub(
            rf"(?<![\w/.-])(?:{anywhere})(?![\w/-])|^(?:{first})(?= (?:is|has) )",
            lambda name: f"--{prefix}{name[0]}".replace("_", "-"),
            str(error),
        )
        raise InputError(text) from None
