"""The one exception for bad input from a person: files, options, checkpoints, data."""


class InputError(ValueError):
    """What was wrong, with which value, and what to do, in one sentence.

    The command line prints the sentence without a traceback and exits with code 2.
    """
