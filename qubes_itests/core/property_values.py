"""Values of properties: read from what people and programs write, and written back."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["conversion", "to_bool", "to_int", "to_text"]

_TRUE: Final = {"1", "true", "yes", "on"}
_FALSE: Final = {"0", "false", "no", "off"}
_INTEGER: Final = re.compile(r"-?[0-9]{1,20}", re.ASCII)


def to_bool(value: object) -> bool:
    """Read a truth value the way Qubes does: ``True``, ``"yes"``, ``"0"``, 1.

    :raise ValueError: for what is neither.
    """
    text = str(value).strip().lower()
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ValueError("it takes a truth value: True, False, yes, no, on, off, 1, 0")


def to_int(value: object) -> int:
    """Read a whole number: an int, or its decimal digits; nothing is rounded.

    :raise ValueError: for anything else.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and _INTEGER.fullmatch(value):
        return int(value)
    raise ValueError("it takes a whole number")


def _to_str(value: object) -> str:
    if value is None:
        raise ValueError("it takes a text, and None is none")
    return str(value)


def conversion(kind: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return what makes a value of a type out of what people write."""
    return _CONVERSIONS.get(kind, kind)


_CONVERSIONS: Final[dict[Any, Callable[[Any], Any]]] = {
    bool: to_bool,
    int: to_int,
    str: _to_str,
}


def to_text(value: object) -> str:
    """Return a value as text that sets the property to it again; None is empty."""
    return "" if value is None else str(value)
