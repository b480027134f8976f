"""Audio in, variations out: `python sample.py INPUT -o OUT` (the same as `vampnet sample`)."""

from vampnet_jax.cli import run

if __name__ == "__main__":
    run("sample")
