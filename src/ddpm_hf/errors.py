"""What a user is told when something cannot go on; checks of a word and of a whole number.

`InputError` is input that its user can mend, `TrainingError` a run that failed on its way, and
`Stopped` a run that was asked to stop and saved its state. The command line turns each into one
line and an exit code.
"""

import difflib
from collections.abc import Iterable
from numbers import Integral

EXIT_FAILED, EXIT_INPUT, EXIT_STOPPED, EXIT_INTERRUPTED = 1, 2, 75, 130
"""Exit codes beside 0. 75 is EX_TEMPFAIL of sysexits.h: the same command again goes on; 130 is
what shells make of Ctrl-C."""


class InputError(ValueError):
    """A setting, file or image set that its user can mend: one line, exit code 2."""


class TrainingError(RuntimeError):
    """A run that cannot go on, and why: one line, exit code 1. Earlier checkpoints stand."""


class Stopped(SystemExit):
    """A run stopped by a signal, its state saved; a script that does not catch it exits with 75."""

    def __init__(self, reason: str) -> None:
        super().__init__(EXIT_STOPPED)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


def did_you_mean(value: object, choices: Iterable[str], *, prefix: str = "") -> str:
    """' Did you mean X?' for the choice nearest to `value`, or an empty string; X with a prefix."""
    near = difflib.get_close_matches(str(value), list(choices), n=1)
    return f" Did you mean {prefix + near[0]!r}?" if near else ""


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise InputError, naming the nearest valid word, unless `value` is one of `choices`."""
    choices = list(choices)
    if value not in choices:
        near = did_you_mean(value, choices)
        raise InputError(f"{name} must be one of {', '.join(choices)}; got {value!r}.{near}")


def check_whole(name: str, value: object, least: int = 1, most: int | None = None) -> None:
    """Raise InputError unless a value is a whole number from `least` to `most`."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        rule = f"at least {least}" if most is None else f"between {least} and {most}"
        raise InputError(f"{name} must be a whole number {rule}; got {value!r}")
