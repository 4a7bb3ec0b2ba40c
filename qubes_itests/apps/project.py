"""Where in an app's repository its test plugin is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qubes_itests.host.tree import files_of

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["find_projects"]

_FILES: Final = ("setup.py", "setup.cfg", "pyproject.toml")
_MARK: Final = b"qubes.tests.extra"
#: Directories below the app's own: tests/, tests/integration/.
_DEPTH: Final = 2


def find_projects(directory: Path) -> list[Path]:
    """Return the directories from which pip installs test plugins, the app's own first.

    A project is one whose setup.py, setup.cfg or pyproject.toml names an entry point
    group of test plugins. Below a project no other is looked for.

    :param directory: the app's.
    """
    found: dict[Path, None] = {}
    for name in sorted(files_of(directory), key=lambda path: (len(path.parts), path)):
        below = name.parent
        if name.name not in _FILES or len(below.parts) > _DEPTH:
            continue
        if any(directory / parent in found for parent in below.parents):
            continue
        file = directory / name
        # others may have a folder of that name, or a link that leads nowhere
        if file.is_file() and _MARK in file.read_bytes():
            found[directory / below] = None
    return list(found)
