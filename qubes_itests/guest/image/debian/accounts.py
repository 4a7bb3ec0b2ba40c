"""The users and groups of a Qubes VM, added to those that a distribution has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["add_accounts", "with_lines"]

_LINES: Final = {
    "passwd": ("user:x:1000:1000:user:/home/user:/bin/bash",),
    "group": ("qubes:x:98:user", "user:x:1000:"),
    "shadow": ("user:*:1:0:99999:7:::",),
    "gshadow": ("qubes:!::user", "user:!::"),
}


def add_accounts(root: Path) -> None:
    """Add the user `user` and the group `qubes` to a root filesystem.

    :param root: its directory.
    """
    for name, lines in _LINES.items():
        path = root / "etc" / name
        if path.is_file():
            path.write_text(with_lines(path.read_text(), lines))


def with_lines(text: str, lines: tuple[str, ...]) -> str:
    """Return a file of accounts with more of them.

    :param text: as it is, a line for each account, which begins with its name.
    :param lines: the accounts; they replace those of the same names.
    """
    names = {line.partition(":")[0] for line in lines}
    kept = [old for old in text.splitlines() if old.partition(":")[0] not in names]
    return "".join(f"{line}\n" for line in (*kept, *lines))
