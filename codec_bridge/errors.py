"""Errors that a person can mend: bad input (files, options, checkpoints, data) and full disks."""

import errno

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
NO_SPACE_WORDS = ("No space left", "quota exceeded")
"""How libraries say it that raise no OSError."""


class InputError(ValueError):
    """What was wrong, with which value, and what to do, in one sentence.

    The command line prints the sentence without a traceback and exits with code 2.
    """


def no_space(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is a full disk or quota."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            return True
        if any(words in str(error) for words in NO_SPACE_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False
