"""The client tools of Qubes OS: which are installed, and programs that run them."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "OTHER_NAMES",
    "PACKAGE",
    "installed_tools",
    "write_program",
    "write_tools",
]

PACKAGE: Final = "qubesadmin"
_PREFIXES: Final = ("qvm_", "qubes_")
#: Tools that are another one, told by the name that it is called by.
OTHER_NAMES: Final = {
    "qvm-block": "qvm-device",
    "qvm-pci": "qvm-device",
    "qvm-usb": "qvm-device",
}
_EXECUTABLE: Final = 0o755


def installed_tools() -> list[str]:
    """Return the names of the tools that are installed; none if the client is not."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return []
    folder = Path(next(iter(spec.submodule_search_locations))) / "tools"
    names = {
        path.stem.replace("_", "-")
        for path in folder.glob("*.py")
        if path.stem.startswith(_PREFIXES)
    }
    names |= {alias for alias, name in OTHER_NAMES.items() if name in names}
    return sorted(names)


def write_tools(directory: Path, admin_socket: Path | None) -> bool:
    """Write a program for each tool that is installed; tell whether there are any.

    :param directory: an existing one.
    :param admin_socket: of the server that they call; None for that of dom0.
    """
    tools = installed_tools()
    run = [sys.executable, "-m", "qubes_itests", "qvm", "--socket", admin_socket]
    for name in tools:
        module = OTHER_NAMES.get(name, name).replace("-", "_")
        main = f"from {PACKAGE}.tools.{module} import main; sys.exit(main())"
        direct = [sys.executable, "-c", f"import sys; sys.argv[0] = {name!r}; {main}"]
        write_program(
            directory / name, [*run, name] if admin_socket is not None else direct
        )
    return bool(tools)


def write_program(path: Path, command: Sequence[object]) -> None:
    """Write a program that runs a command, with the arguments that it gets."""
    words = " ".join(shlex.quote(str(word)) for word in command)
    path.write_text(f'#!/bin/sh\nexec {words} "$@"\n', encoding="utf-8")
    path.chmod(_EXECUTABLE)
