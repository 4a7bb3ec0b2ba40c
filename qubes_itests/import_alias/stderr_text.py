"""Text of a guest, made fit for a log."""

from __future__ import annotations

from typing import Final

__all__ = ["sanitize_stderr_for_log"]

_LAST_PRINTABLE: Final = 0x7E

#: Bytes of which a log gets to see something.
_LONGEST: Final = 4096


def sanitize_stderr_for_log(untrusted_stderr: bytes) -> str:
    """Return the begin of a guest's error output, all but printable ASCII as ``_``.

    So it is one line, for separate lines could pass for those of others.  In Qubes OS
    it is part of `qubes.utils`.
    """
    return "".join(
        chr(byte) if ord(" ") <= byte <= _LAST_PRINTABLE else "_"
        for byte in untrusted_stderr[:_LONGEST]
    )
