"""What can be wrong with serving, and with calling who serves.

::

    HarnessError
     +-- NoServerError         nobody serves, or not there
     +-- ClientMissingError    the client tools are not installed
     +-- UnknownToolError      they are, and this one is not among them
     +-- DirectoryInUseError   another one serves from that directory
     +-- CallFailedError       a call of the Admin API from our own command line failed
     +-- BadCallError          a program of the client tools asks for what cannot be
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qubes_itests.exc import HarnessError
from qubes_itests.exit_codes import ExitCode

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

__all__ = [
    "BadCallError",
    "CallFailedError",
    "ClientMissingError",
    "DirectoryInUseError",
    "NoServerError",
    "UnknownToolError",
]


class NoServerError(HarnessError):
    """Nobody serves the Admin API.

    :param path: where it was looked for; None if everywhere.
    """

    exit_code = ExitCode.USAGE_ERROR

    def __init__(self, path: Path | None = None) -> None:
        where = "Nothing serves" if path is None else f"Nothing serves on {path}"
        super().__init__(f"{where}: begin with `python -m qubes_itests serve`.")
        self.path = path


class ClientMissingError(HarnessError):
    """The client tools of Qubes OS are not installed.

    :param python: the interpreter that does not find them.
    """

    exit_code = ExitCode.USAGE_ERROR

    def __init__(self, python: str) -> None:
        super().__init__(
            f"{python} has no module qubesadmin: the client tools are not on the"
            " package index. Clone the git repository qubes-core-admin-client of Qubes"
            f" OS, and install it: {python} -m pip install ./qubes-core-admin-client"
        )
        self.python = python


class UnknownToolError(HarnessError):
    """The client has no such tool.

    :param name: what was asked for.
    :param known: the tools that it has.
    """

    exit_code = ExitCode.USAGE_ERROR

    def __init__(self, name: str, known: Iterable[str]) -> None:
        super().__init__(f"There is no tool {name!r}; there are: {', '.join(known)}.")
        self.name = name


class DirectoryInUseError(HarnessError):
    """Another one serves from this directory.

    :param directory: it.
    """

    exit_code = ExitCode.USAGE_ERROR

    def __init__(self, directory: Path) -> None:
        super().__init__(
            f"{directory} is in use by another `serve`: end that one, or give this one"
            " another --directory."
        )
        self.directory = directory


class CallFailedError(HarnessError):
    """A call of the Admin API from our own command line failed; it says why."""

    exit_code = ExitCode.USAGE_ERROR


class BadCallError(HarnessError):
    """A program of the client tools asks for what cannot be."""
