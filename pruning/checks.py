"""Types and seeds of settings, checked once where they are made, so that nothing stops later without a reason."""

import dataclasses
import inspect
import math
import types
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from .errors import UserError, closest

Kind = TypeVar("Kind")

SEEDS = 2**63
"""Seeds lie below; PyTorch's generators take no more."""

WORDS: Mapping[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    list: "a list",
    tuple: "a list",
    dict: "a mapping",
    type(None): "None",
}


def check_types(settings: Any) -> None:
    """Refuse fields of a settings dataclass that are not of the declared type; numbers must be finite.

    A whole number is taken for a float, a boolean is not taken for a number. NumPy's numbers become Python's.

    Args:
        settings: An instance of a dataclass, frozen or not. Fields of other types than numbers, texts, settings and
            lists or mappings of these are not looked at.

    Raises:
        UserError: Names the field, the wanted type and what came.
    """
    hints = get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value, hint = getattr(settings, field.name), hints[field.name]
        if isinstance(value, np.number):
            value = value.item()
            object.__setattr__(settings, field.name, value)  # the settings are frozen only after they are made
        if not _fits(value, hint):
            raise UserError(f"{field.name} must be {_words(hint)}, but got {repr(value)[:80]}")


def check_kind(value: Any, kind: type[Kind], where: str, advice: str = "") -> Kind:
    """Return an argument of a public function; refuse what is not of the kind that it works with.

    Args:
        value: What was given.
        kind: Its class.
        where: The function or class that was called, for the error.
        advice: What to do; how a `kind` is made by default.

    Raises:
        UserError: Names the wanted kind and what came.
    """
    if isinstance(value, kind):
        return value
    came = repr(value)[:80] if value is None or isinstance(value, (str, Real)) else type(value).__name__
    if not advice:
        first = list(inspect.signature(kind).parameters)[:2]
        advice = f"{kind.__name__}({', '.join(f'{name}=…' for name in first)}, …) makes one"
    article = "an" if kind.__name__[0] in "AEIOU" else "a"
    raise UserError(f"{where} needs {article} {kind.__name__}, but got {came}; {advice}")


def check_keys(given: Any, known: Mapping[str, str], what: str) -> Mapping[str, Any]:
    """Return a mapping of choices, empty for None; refuse what is no mapping, and keys that mean nothing.

    Args:
        given: What was given.
        known: Each key that may be given, and an example of its value.
        what: Its name in the error.

    Raises:
        UserError: Names the closest known key.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        example = ", ".join(f'"{key}": {value}' for key, value in known.items())
        raise UserError(f"{what} must be a mapping such as {{{example}}}, but got {repr(given)[:80]}")
    for key in given:
        if key not in known:
            raise UserError(f"{what} must hold known keys only, but got {key!r}{closest(str(key), known)}")
    return given


def check_seed(seed: Any, what: str = "seed") -> int:
    """Return the seed; refuse what is no whole number in [0, 2**63).

    Args:
        seed: What was given.
        what: Its name in the error.
    """
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= int(seed) < SEEDS:
        raise UserError(f"{what} must be a whole number from 0 to 2**63 - 1, but got {repr(seed)[:80]}")
    return int(seed)


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin in (list, tuple):
        return isinstance(value, (list, tuple)) and all(_fits(item, parts[0]) for item in value)
    if origin is dict:
        return isinstance(value, Mapping) and all(_fits(item, parts[1]) for item in value.values())
    if hint is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, Real) and not isinstance(value, bool) and _is_finite(value)
    if hint in (bool, str, type(None)) or dataclasses.is_dataclass(hint):
        return isinstance(value, hint)
    return True


def _is_finite(value: Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the largest float
        return False


def _words(hint: Any) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(part) for part in parts)
    if origin in (list, tuple, dict):
        inner = WORDS.get(parts[-1] if origin is dict else parts[0], "")
        plural = {"a whole number": " of whole numbers", "a finite number": " of finite numbers"}.get(inner, "")
        return WORDS[origin] + plural
    return str(WORDS.get(hint) or getattr(hint, "__name__", hint))
