"""Validators of arguments and payloads, for methods to declare.

One of an argument is called with the call, one of a payload with the call and the
bytes.  Each returns what the method gets, or raises an error saying what is expected.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from qubes_itests.admin.values import PRINTABLE, parse_bool
from qubes_itests.core.exc import (
    ProtocolError,
    QubesLabelNotFoundError,
    QubesNoSuchPropertyError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from qubes_itests.admin.dispatch import Call
    from qubes_itests.core.pools import Pool
    from qubes_itests.core.properties import Property, PropertyHolder
    from qubes_itests.core.storage import Volume

__all__ = [
    "app_property",
    "ascii_text",
    "boolean",
    "feature_name",
    "label",
    "label_name",
    "lines",
    "number",
    "pairs",
    "pool",
    "printable",
    "property_of",
    "revisions_to_keep",
    "size",
    "tag_name",
    "vm_property",
    "volume",
    "words_among",
]

_NUMBER: Final = re.compile(r"0|[1-9][0-9]{0,18}")
_FEATURE: Final = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_TAG: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")
_LABEL: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def ascii_text(data: bytes) -> str:
    """Return bytes as text; ProtocolError unless all is ASCII."""
    try:
        return data.decode("ascii")
    except UnicodeDecodeError:
        raise ProtocolError("expected a payload of plain ASCII") from None


def printable(call: Call, data: bytes) -> str:
    """Take one line of ASCII without control characters."""
    del call
    text = ascii_text(data)
    if not PRINTABLE.fullmatch(text):
        raise ProtocolError("expected a payload without control characters")
    return text


def lines(call: Call, data: bytes) -> list[str]:
    r"""Take lines of ASCII without control characters; the last ``\n`` may lack.

    What ends a line elsewhere, a form feed say, is a control character too.
    """
    del call
    found = ascii_text(data).removesuffix("\n").split("\n") if data else []
    if not all(map(PRINTABLE.fullmatch, found)):
        raise ProtocolError("expected lines without control characters")
    return found


def _number(data: bytes) -> int:
    text = ascii_text(data)
    if not _NUMBER.fullmatch(text):
        raise ProtocolError(
            f"expected a number of 1 to 19 digits without leading 0, got {text[:40]!r}"
        )
    return int(text)


def number(call: Call, data: bytes) -> int:
    """Take digits: no sign, no space, no leading zero, fewer than 20."""
    del call
    return _number(data)


#: Bytes, as digits.
size = number


def revisions_to_keep(call: Call, data: bytes) -> int:
    """Take a number from -1."""
    del call
    return -1 if data == b"-1" else _number(data)


def pairs(words: Iterable[str]) -> dict[str, str]:
    """Return words of the form KEY=VALUE as a mapping; ProtocolError for others."""
    found: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ProtocolError(f"expected KEY=VALUE, got {word!r}")
        if key in found:
            raise ProtocolError(f"{key!r} is given twice")
        found[key] = value
    return found


def boolean(call: Call, data: bytes) -> bool:
    """Take a truth value, as properties do."""
    del call
    try:
        return parse_bool(ascii_text(data))
    except ValueError as error:
        raise ProtocolError(f"expected a truth value: {error}") from None


def _named(pattern: re.Pattern[str], what: str) -> Callable[[Call], str]:
    def validate(call: Call) -> str:
        if not pattern.fullmatch(call.raw_argument):
            raise ProtocolError(
                f"expected the name of a {what}, got {call.raw_argument[:80]!r}"
            )
        return call.raw_argument

    return validate


feature_name = _named(_FEATURE, "feature")
tag_name = _named(_TAG, "tag")
label_name = _named(_LABEL, "label")


def label(call: Call) -> Any:
    """Take the name of a label there is."""
    if call.raw_argument.isdigit():
        # an index is no name
        raise QubesLabelNotFoundError(call.raw_argument)
    return call.app.get_label(call.raw_argument)


def property_of(holder: PropertyHolder, name: str) -> Property[Any]:
    """Return the definition of a property; QubesNoSuchPropertyError if none."""
    if not name:
        raise QubesNoSuchPropertyError(holder, name)
    return holder.property_get_def(name)


def vm_property(call: Call) -> Any:
    """Take the name of a property of the destination."""
    return property_of(call.destination, call.raw_argument)


def app_property(call: Call) -> Any:
    """Take the name of a property of the app."""
    return property_of(call.app, call.raw_argument)


def volume(call: Call) -> Volume:
    """Take the name of a volume of the destination."""
    volumes: Mapping[str, Volume] = call.destination.volumes
    if call.raw_argument not in volumes:
        raise ProtocolError(
            f"VM {call.destination} has no volume {call.raw_argument!r}:"
            f" it has {', '.join(volumes) or 'none'}"
        )
    return volumes[call.raw_argument]


def pool(call: Call) -> Pool:
    """Take the name of a pool."""
    pools = call.app.pools
    if call.raw_argument not in pools:
        raise ProtocolError(
            f"there is no pool {call.raw_argument!r}: there are {', '.join(pools)}"
        )
    return pools[call.raw_argument]


def words_among(*known: str) -> Callable[[Call], frozenset[str]]:
    """Take any of some words, joined by ``+``, each at most once."""

    def validate(call: Call) -> frozenset[str]:
        words = call.raw_argument.split("+") if call.raw_argument else []
        if len(set(words)) < len(words) or not set(words) <= set(known):
            raise ProtocolError(
                f"expected any of {', '.join(known)}, joined by +,"
                f" got {call.raw_argument[:80]!r}"
            )
        return frozenset(words)

    return validate
