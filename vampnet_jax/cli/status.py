"""Exit statuses of every command, and what Ctrl-C does while a command still loads its modules."""

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator

from codec_bridge.errors import no_space

OK = 0
FAILED_CHECK = 1
"""The command worked and its answer is no."""
USER_ERROR = 2
"""Bad input; one sentence on standard error says what to do."""
TRY_AGAIN = 75
"""Asked to terminate (SIGTERM, preemption) and everything saved: run the same command again.

It is EX_TEMPFAIL of sysexits.h.
"""
INTERRUPTED = 130
"""Ctrl-C, as shells have it."""
BROKEN_PIPE = 141
"""Whoever read the output has stopped reading (SIGPIPE), as shells have it."""


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """A context for imports: Ctrl-C ends the process at once.

    An exception could come up anywhere inside a library that is half imported, which then reports
    an error of its own.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: object) -> None:
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        if before is signal.SIG_DFL:  # the root scripts leave it so
            before = signal.default_int_handler
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def quiet_if_unwritten() -> Iterator[None]:
    """A context that ends the process without a traceback when output cannot be written.

    Either the disk is full, or whoever read the output, such as `head`, has seen enough.
    """
    try:
        try:
            yield
        finally:
            print(end="", flush=True)  # what is short has not been written before
        return
    except BrokenPipeError:
        if not _is_unread(sys.stdout.fileno()):
            raise  # of another pipe
        status = BROKEN_PIPE
    except Exception as error:
        if not no_space(error):
            raise
        print("error: The disk is full; make room and run the same command again.", file=sys.stderr)
        status = USER_ERROR
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more at exit
    sys.exit(status)


def _is_unread(fd: int) -> bool:
    """Whether it is a pipe whose reading end is closed."""
    poll = select.poll()
    poll.register(fd, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
