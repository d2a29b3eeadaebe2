"""Commands: one file for each."""

from dit_jax.cli import interrupt

interrupt.listen_from_the_first_import()
