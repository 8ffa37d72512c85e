"""The errors that nag_jax raises on purpose, and how it quotes those of others.

A message says what was wrong, where, and what to do, in one or two lines. `main` prints it without a traceback (unless
`--debug`) and leaves with the error's exit code.
"""


class NagJaxError(Exception):
    """A run cannot go on; the message says why and what to do."""

    exit_code = 1


class UserError(NagJaxError):
    """A mistake that the user can mend: a wrong key, path, shape, flag or file."""

    exit_code = 2


class TrainingDivergedError(NagJaxError):
    """The loss stopped being finite; the message names the step and the last good checkpoint."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class where it has none: libraries may say more than fits."""
    return (str(error).splitlines() or [type(error).__name__])[0]
