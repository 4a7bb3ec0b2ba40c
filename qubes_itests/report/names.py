"""Names of files made from names that tests and guests choose."""

from __future__ import annotations

import hashlib
import re

from qubes_itests.untrusted_text import safe_text

__all__ = ["file_name", "one_line"]

_LONGEST = 120


def file_name(text: str) -> str:
    """Return a name for a file or directory that says what `text` says.

    Only letters, digits, ``_``, ``-`` and inner dots are left; two texts that differ
    get names that differ.
    """
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", text.replace("::", "."))
    name = name.lstrip(".-")[:_LONGEST]
    if name == text.replace("::", ".") and "." not in text and name:
        return name
    mark = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=4).hexdigest()
    return f"{name or 'test'}-{mark}"


def one_line(text: str, width: int = 200) -> str:
    """Return the first line that says something, bounded and printable."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return safe_text(line, limit=width)
