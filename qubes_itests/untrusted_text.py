"""Untrusted text of guests and other programs, made safe to show.

Wherever such text is shown, logged or put into a report it goes through `safe_text`.
What it returns steers no terminal, forges no line, turns no text around, and is no
command to the log viewer of a CI.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["quoted", "safe_text"]

#: Characters of a text that is not told how many it may have.
LIMIT: Final = 4096

_SUSPECT: Final = re.compile(r"[^\t\n -~]")
_ONE_LINE: Final = re.compile(r"[^ -~]")
#: Azure Pipelines, TeamCity, and older commands of GitHub: anywhere in a line.
_MARK: Final = re.compile(r"#(?=#\w*\[)")
#: GitHub, at the beginning of a line. Marks of GitLab have control characters in them.
_COMMAND: Final = re.compile(r"^([ \t]*):(?=:)", re.MULTILINE)


def safe_text(
    raw: bytes | bytearray | memoryview | str,
    *,
    lines: bool = False,
    limit: int | None = LIMIT,
) -> str:
    r"""Return a text in which all that does not show is escaped, as in ``\x1b``.

    Escaped are control characters of either set, those that are not seen or that change
    the direction of writing, and bytes that are no UTF-8. Of what begins a command to a
    CI (``::error::``, ``##[error]``) one character is.

    :param raw: the text; bytes are taken for UTF-8.
    :param lines: keep tabs and the ends of lines, which else are escaped as well. Among
        lines of others such a text has to be `quoted`.
    :param limit: the most characters to return, ``…`` for what is cut; None for all.
    """
    if not isinstance(raw, str):
        # no character has more than four bytes
        part = raw if limit is None else raw[: 4 * limit + 4]
        raw = bytes(part).decode("utf-8", "backslashreplace")
    text = raw if limit is None else raw[: limit + 1]
    if lines:
        text = _SUSPECT.sub(_escaped, text.replace("\r\n", "\n"))
    else:
        text = _ONE_LINE.sub(_escaped, text)
    text = _COMMAND.sub(r"\1\\x3a", _MARK.sub(r"\\x23", text))
    if limit is not None and len(text) > limit:
        text = f"{text[: limit - 1]}…"
    return text


def quoted(text: str) -> str:
    """Return a safe text with each of its lines marked, so that none is ours."""
    return "\n".join(f"| {line}" for line in text.split("\n"))


def _escaped(match: re.Match[str]) -> str:
    character = match[0]
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode("ascii")
