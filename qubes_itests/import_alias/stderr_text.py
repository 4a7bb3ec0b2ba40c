"""Text of a guest, made fit for a log."""

from __future__ import annotations

from typing import Final

__all__ = ["sanitize_stderr_for_log"]

_LAST_PRINTABLE: Final = 0x7E


def sanitize_stderr_for_log(untrusted_stderr: bytes) -> str:
    """Return a guest's error output with all but printable ASCII replaced by ``_``.

    Line ends and tabs stay.  In Qubes OS it is part of `qubes.utils`.
    """
    kept = b"\n\t"
    return "".join(
        chr(byte) if byte in kept or ord(" ") <= byte <= _LAST_PRINTABLE else "_"
        for byte in untrusted_stderr
    )
