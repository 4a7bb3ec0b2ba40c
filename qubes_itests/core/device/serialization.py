r"""What is said of a device on the wire: ``key='value' key='value'``.

Values are printable ASCII, with ``\'`` for a quotation mark.  Keys that begin with
``_`` are options, or data of one class of devices.  The format is that of Qubes OS 4.3;
what it leaves ambiguous is refused here.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from qubes_itests.core.exc import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["pack", "unpack"]

_KEY: Final = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_VALUE: Final = re.compile(r"[ -~]*")
#: A backslash that no quotation mark follows stands for itself.
_PAIR: Final = re.compile(
    r"([A-Za-z0-9_.-]{1,128})='((?:[^'\\]|\\'|\\(?!'))*)'(?: +|$)"
)


def pack(
    properties: Mapping[str, str | None], options: Mapping[str, str] | None = None
) -> bytes:
    """Return properties and options as they are sent; None is left out.

    :raise ProtocolError: for a key or a value that cannot be sent.
    """
    pairs = {key: value for key, value in properties.items() if value is not None}
    pairs |= {f"_{key}": value for key, value in (options or {}).items()}
    return " ".join(_pair(key, str(value)) for key, value in pairs.items()).encode()


def _pair(key: str, value: str) -> str:
    if not _KEY.fullmatch(key):
        raise ProtocolError(f"{key!r} cannot be the name of a device's property")
    # with a backslash at the end, the closing mark would be taken for part of it
    if not _VALUE.fullmatch(value) or value.endswith("\\"):
        raise ProtocolError(f"{key!r} of a device cannot be {value!r}")
    quoted = value.replace("'", r"\'")
    return f"{key}='{quoted}'"


def unpack(serialization: bytes) -> tuple[dict[str, str], dict[str, str]]:
    """Return the properties and the options of what was sent.

    :raise ProtocolError: for anything that `pack` does not write, duplicates included.
    """
    try:
        text = serialization.decode("ascii").strip(" ")
    except UnicodeDecodeError as error:
        raise ProtocolError("what is said of a device is not ASCII") from error
    found: dict[str, str] = {}
    end = 0
    while end < len(text):
        pair = _PAIR.match(text, end)
        if pair is None or not _VALUE.fullmatch(pair[2]):
            raise ProtocolError(f"what is said of a device ends at character {end}")
        key, end = pair[1], pair.end()
        if key in found:
            raise ProtocolError(f"{key!r} is said twice of a device")
        found[key] = pair[2].replace(r"\'", "'")
    options = {k[1:]: v for k, v in found.items() if k.startswith("_")}
    return {k: v for k, v in found.items() if not k.startswith("_")}, options
