"""The table of what a run needs of the machine, and which package brings it."""

from __future__ import annotations

import glob
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qubes_itests.host.command import search_path

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Need", "distribution", "install_command", "needs", "needs_here"]

_TABLE = Path(__file__).with_name("packages.tsv")
_COLUMNS = ("debian", "ubuntu")
_ELF_INTERPRETER = 3


@dataclass(frozen=True)
class Need:
    """One thing that the machine must have."""

    #: "tool", "static", "file", "guest" or "test".
    kind: str
    #: A program, a glob, or the name of what guests need.
    name: str
    #: What it is for, as the predicate of a sentence.
    purpose: str
    #: The package that brings it, per distribution.
    packages: Mapping[str, str]

    @property
    def label(self) -> str:
        """Its name for people: without directories."""
        return self.name.rpartition("/")[2] if self.kind == "file" else self.name

    def present(self) -> bool:
        """Return whether it is installed."""
        if self.kind == "file":
            return bool(glob.glob(self.name))  # noqa: PTH207  # an absolute pattern
        program = find_program(self.name)
        return program is not None and (self.kind == "tool" or is_static(program))


def needs() -> list[Need]:
    """Return the table."""
    lines = _TABLE.read_text(encoding="utf-8").splitlines()
    return [_parse(line) for line in lines if line and not line.startswith("#")]


def needs_here() -> list[Need]:
    """Return what must be installed on the machine itself for runs."""
    return [need for need in needs() if need.kind not in ("guest", "test")]


def distribution() -> str | None:
    """Return the table's column for this machine: "debian", "ubuntu" or None."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return None
    family = [release.get("ID", ""), *release.get("ID_LIKE", "").split()]
    return next((name for name in family if name in _COLUMNS), None)


def install_command(missing: list[Need]) -> str:
    """Return the command that brings what is missing, or words that name it."""
    column = distribution()
    if column is None:
        return f"Install: {', '.join(need.label for need in missing)}"
    packages = sorted({need.packages[column] for need in missing})
    return f"apt-get install --no-install-recommends {' '.join(packages)}"


def find_program(name: str) -> Path | None:
    """Return where a program is that `host.command.run` would run."""
    found = shutil.which(name, path=search_path())
    return Path(found) if found else None


def is_static(program: Path) -> bool:
    """Return whether an ELF program asks for no dynamic linker."""
    data = program.read_bytes()[:4096]
    if data[:5] != b"\x7fELF\x02":
        return False
    table = int.from_bytes(data[32:40], "little")
    size = int.from_bytes(data[54:56], "little")
    count = int.from_bytes(data[56:58], "little")
    starts = (table + index * size for index in range(count))
    return all(data[start] != _ELF_INTERPRETER for start in starts if start < len(data))


def _parse(line: str) -> Need:
    need, purpose, *packages = line.split("\t")
    kind, _, name = need.partition(":")
    return Need(kind, name, purpose, dict(zip(_COLUMNS, packages, strict=True)))
