"""The pages of the documentation, and the examples in them.

A fenced block of Python is a file, when it begins with ``# NAME.py``, and else a whole
program.
"""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["PAGES", "ROOT", "blocks", "files", "page", "programs"]

ROOT = Path(__file__).parents[2]

#: What there is to read, relative to `ROOT`.
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "RELEASING.md",
    "SECURITY.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
    *sorted(
        f"docs/decisions/{path.name}" for path in (ROOT / "docs/decisions").iterdir()
    ),
    "storage/README.md",
    "tests/benchmarks/README.md",
)

_FILE = re.compile(r"# ([\w/]+\.py)\b.*\n")


def page(name: str) -> str:
    """Return the text of a page."""
    return (ROOT / name).read_text()


def blocks(name: str, language: str) -> list[str]:
    """Return the fenced blocks of a page in that language."""
    return re.findall(
        rf"^```{language}\n(.*?)^```$", page(name), re.DOTALL | re.MULTILINE
    )


def files(name: str) -> dict[str, str]:
    """Return the examples of a page that are files: paths, and what is in them."""
    found = [(_FILE.match(text), text) for text in blocks(name, "python")]
    return {match[1]: text for match, text in found if match}


def programs(name: str) -> list[str]:
    """Return the examples of a page that are programs."""
    return [text for text in blocks(name, "python") if not _FILE.match(text)]
