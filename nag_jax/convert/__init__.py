"""Public weights to this project's folders and back; run as `python -m nag_jax.convert`."""
