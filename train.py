"""Train a model from a folder of tokens: the same as `vampnet train`."""

from vampnet_jax.cli import run

if __name__ == "__main__":
    run("train")
