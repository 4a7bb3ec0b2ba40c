"""The client tools of Qubes OS, run in this process."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import os
import runpy
import sys
from typing import TYPE_CHECKING

from qubes_itests.exc import UsageError
from qubes_itests.run.client_tools import OTHER_NAMES, PACKAGE, installed_tools
from qubes_itests.serve.environment import HOOK, variables

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qubes_itests.serve.place import Place

__all__ = ["run_tool"]


def run_tool(place: Place, name: str, arguments: Sequence[str]) -> int:
    """Run a tool in this process, and return its exit status.

    :param place: the server that it is to call.
    :param name: as on the command line of Qubes OS; ``qvm-`` may be left out.
    :param arguments: what follows the name.
    :raise UsageError: when the client is not installed, or has no such tool.
    """
    tools = installed_tools()
    if not tools:
        raise UsageError(
            f"{sys.executable} has no module qubesadmin: the client tools are not on"
            " the package index. Clone the git repository qubes-core-admin-client of"
            f" Qubes OS, and install it: {sys.executable} -m pip install"
            " ./qubes-core-admin-client"
        )
    found = next((each for each in (name, f"qvm-{name}") if each in tools), None)
    if found is None:
        raise UsageError(f"There is no tool {name!r}; there are: {', '.join(tools)}.")
    os.environ.update(variables(place))
    runpy.run_path(str(HOOK / "sitecustomize.py"))
    module = OTHER_NAMES.get(found, found).replace("-", "_")
    sys.argv = [found, *arguments]
    status = importlib.import_module(f"{PACKAGE}.tools.{module}").main()
    if inspect.iscoroutine(status):
        status = asyncio.run(status)
    return status if isinstance(status, int) else 0
