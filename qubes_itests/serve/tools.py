"""The client tools of Qubes OS: which there are, and running one."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import os
import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qubes_itests.serve.environment import HOOK, variables
from qubes_itests.serve.exc import ServeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qubes_itests.serve.place import Place

__all__ = ["installed_tools", "run_tool"]

_PACKAGE: Final = "qubesadmin"
_PREFIXES: Final = ("qvm_", "qubes_")
#: Tools that are another one, told by the name that it is called by.
_OTHER_NAMES: Final = {
    "qvm-block": "qvm-device",
    "qvm-pci": "qvm-device",
    "qvm-usb": "qvm-device",
}


def installed_tools() -> list[str]:
    """Return the names of the tools that are installed; none if the client is not."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return []
    folder = Path(next(iter(spec.submodule_search_locations))) / "tools"
    names = {
        path.stem.replace("_", "-")
        for path in folder.glob("*.py")
        if path.stem.startswith(_PREFIXES)
    }
    names |= {alias for alias, name in _OTHER_NAMES.items() if name in names}
    return sorted(names)


def run_tool(place: Place, name: str, arguments: Sequence[str]) -> int:
    """Run a tool in this process, and return its exit status.

    :param place: the server that it is to call.
    :param name: as on the command line of Qubes OS; ``qvm-`` may be left out.
    :param arguments: what follows the name.
    :raise ServeError: when the client is not installed, or has no such tool.
    """
    tools = installed_tools()
    if not tools:
        raise ServeError(
            f"{sys.executable} has no module qubesadmin: the client tools are not on"
            " the package index. Clone the git repository qubes-core-admin-client of"
            f" Qubes OS, and install it: {sys.executable} -m pip install"
            " ./qubes-core-admin-client"
        )
    found = next((each for each in (name, f"qvm-{name}") if each in tools), None)
    if found is None:
        raise ServeError(f"There is no tool {name!r}; there are: {', '.join(tools)}.")
    os.environ.update(variables(place))
    runpy.run_path(str(HOOK / "sitecustomize.py"))
    module = _OTHER_NAMES.get(found, found).replace("-", "_")
    sys.argv = [found, *arguments]
    status = importlib.import_module(f"{_PACKAGE}.tools.{module}").main()
    if inspect.iscoroutine(status):
        status = asyncio.run(status)
    return status if isinstance(status, int) else 0
