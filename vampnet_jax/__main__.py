"""`python -m vampnet_jax` is the command `vampnet`."""

from vampnet_jax.cli import main

main()
