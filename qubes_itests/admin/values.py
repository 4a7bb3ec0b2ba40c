"""Values of properties, as the Admin API writes them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from qubes_itests.core.exc import ProtocolError
from qubes_itests.core.properties import to_bool

if TYPE_CHECKING:
    from collections.abc import Callable

    from qubes_itests.core.properties import Property, PropertyHolder

__all__ = [
    "PRINTABLE",
    "escape",
    "parse_bool",
    "parse_value",
    "write_default",
    "write_value",
]

_INTEGER: Final = re.compile(r"-?(?:0|[1-9][0-9]{0,18})")
PRINTABLE: Final = re.compile(r"[ -~]*")
_VM_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


def _write(prop: Property[Any], value: Any) -> str:
    text = "" if value is None else str(value)
    return f"type={prop.type_name} {text}"


def write_value(holder: PropertyHolder, prop: Property[Any]) -> str:
    """Return ``default=True|False type=TYPE VALUE``; what is not set has no value."""
    try:
        value = getattr(holder, prop.name)
    except AttributeError:
        return f"default=True {_write(prop, None)}"
    return f"default={holder.property_is_default(prop)} {_write(prop, value)}"


def write_default(holder: PropertyHolder, prop: Property[Any]) -> str:
    """Return ``type=TYPE VALUE``; nothing if the property has no default."""
    try:
        return _write(prop, prop.get_default(holder))
    except AttributeError:
        return ""


def escape(text: str) -> str:
    """Return text that has no line breaks, for answers with one item a line."""
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def parse_value(holder: PropertyHolder, prop: Property[Any], data: bytes) -> Any:
    """Return the value that a client wants a property to have.

    :raise QubesPropertyValueError: when it is none of the property's type.
    :raise ProtocolError: when it is not even text.
    """
    try:
        text = data.decode("ascii")
    except UnicodeDecodeError:
        raise ProtocolError("expected a value of plain ASCII") from None
    try:
        return _PARSERS[prop.type_name](prop, text)
    except ValueError as error:
        raise prop.refusal(holder, text, str(error)) from None


def parse_bool(text: str) -> bool:
    """Return a truth value; ValueError for any other text, spaces around included."""
    if text != text.strip():
        raise ValueError("expected a truth value without spaces around it")
    return to_bool(text)


def _parse_int(_prop: Property[Any], text: str) -> int:
    if not _INTEGER.fullmatch(text):
        raise ValueError("expected a whole number")
    return int(text)


def _parse_vm(_prop: Property[Any], text: str) -> str | None:
    if text and not _VM_NAME.fullmatch(text):
        raise ValueError("expected the name of a VM, or nothing")
    return text or None


def _parse_label(_prop: Property[Any], text: str) -> str:
    if not text or text.isdigit() or not PRINTABLE.fullmatch(text):
        raise ValueError("expected the name of a label")
    return text


def _parse_str(prop: Property[Any], text: str) -> str | None:
    if not PRINTABLE.fullmatch(text):
        raise ValueError("expected no control characters")
    return None if not text and prop.allow_none else text


_PARSERS: Final[dict[str, Callable[[Property[Any], str], Any]]] = {
    "bool": lambda _prop, text: parse_bool(text),
    "int": _parse_int,
    "label": _parse_label,
    "str": _parse_str,
    "vm": _parse_vm,
}
