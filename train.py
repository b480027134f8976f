"""Train a model from a folder of tokens: the same as `vampnet train`."""

import signal

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while modules load

    from vampnet_jax.cli import run

    run("train")
