"""The programs, services and environment that a server has for client tools."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qubes_itests.run.client_tools import write_program, write_tools
from qubes_itests.serve.imports import METHODS
from qubes_itests.serve.place import VARIABLE, Place

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["CONSOLE", "HOOK", "exports", "offer_programs", "variables"]

_HERE: Final = Path(__file__).parent
#: A folder for PYTHONPATH: what is in it points the client to the server.
HOOK: Final = _HERE / "hook"
#: A tool that is ours: the client's connects to a console of Xen.
CONSOLE: Final = "qvm-console"


def offer_programs(place: Place, block: Path) -> None:
    """Write the programs that the client tools call, those tools, and `CONSOLE`.

    :param place: where; its directory is there, and empty.
    :param block: the folder of dom0's block devices.
    """
    for directory in (place.programs, place.services, place.dom0_programs):
        directory.mkdir()
    program = [sys.executable, "-I", "-S", _HERE / "program.py"]
    program += [place.relay_socket, place.services]
    write_program(place.programs / "qrexec-client", [*program, "qrexec-client"])
    for name in METHODS:
        write_program(place.services / name, [*program, name])
    # a service of dom0 runs on the machine and as the user that calls it
    write_program(place.services / "qubes.VMShell", ["/bin/bash", "-s", "--"])
    # the tools ask root for what the server's user may do by itself
    write_program(place.dom0_programs / "sudo", ["env"])
    write_program(place.dom0_programs / "losetup", [*program, "losetup", block])
    write_tools(place.programs, place.admin_socket)
    qvm = [sys.executable, "-m", "qubes_itests", "qvm", "--socket", place.admin_socket]
    write_program(place.programs / CONSOLE, [*qvm, CONSOLE])
    # a clone has no menus that would have to be made: there is no desktop
    write_program(place.programs / "qvm-appmenus", ["true"])


def variables(
    place: Place, environment: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Return the variables with which the client tools call a server.

    :param place: the server's.
    :param environment: what they have now.
    """
    path = environment.get("PATH", os.defpath).split(os.pathsep)
    if former := environment.get(VARIABLE):
        programs = str(Place(Path(former)).programs)
        path = [each for each in path if each != programs]
    return {
        VARIABLE: str(place.directory),
        "PYTHONPATH": _before(
            HOOK, environment.get("PYTHONPATH", "").split(os.pathsep)
        ),
        "PATH": _before(place.programs, path),
    }


def _before(directory: Path, others: Iterable[str]) -> str:
    rest = [each for each in others if each and each != str(directory)]
    return os.pathsep.join([str(directory), *rest])


def exports(place: Place) -> str:
    """Return lines for a shell that set `variables`."""
    return "".join(
        f"export {name}={shlex.quote(value)}\n"
        for name, value in variables(place).items()
    )
