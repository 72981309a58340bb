"""The exception for input that its user can mend, and the check of a word against a list."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A setting, file or image set that its user can mend: one line, exit code 2."""


def did_you_mean(value: object, choices: Iterable[str]) -> str:
    """' Did you mean X?' for the choice nearest to `value`, or an empty string."""
    near = difflib.get_close_matches(str(value), list(choices), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise InputError, naming the nearest valid word, unless `value` is one of `choices`."""
    choices = list(choices)
    if value not in choices:
        near = did_you_mean(value, choices)
        raise InputError(f"{name} must be one of {', '.join(choices)}; got {value!r}.{near}")
