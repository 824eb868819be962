"""What a user can get wrong, said in one sentence.

`UserError` marks a mistake in what was asked (a wrong name, a missing folder, an impossible budget), as
opposed to a defect of this code. The command line prints its text and exits with code 2; in Python it is an
ordinary `ValueError`.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A request that cannot be met as asked; the text names the rule, what came and what to do."""


def closest(name: str, known: Iterable[str]) -> str:
    """Return a hint such as `"; did you mean 'taylor_2017'?"`, or the whole list where nothing is near.

    Args:
        name: What the user typed.
        known: All names that would have been accepted.
    """
    options = sorted(known)
    lowered = {option.lower(): option for option in options}
    near = [option for option in lowered if name and option.startswith(name.lower())]
    near = near or get_close_matches(name.lower(), lowered, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {lowered[near[0]]!r}?"
    return f"; known are {', '.join(options)}"
