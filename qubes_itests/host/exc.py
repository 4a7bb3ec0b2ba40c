"""The errors of the host layer.

::

    EnvironmentNotReadyError
     +-- MissingToolError       a program, library or header is not installed
     +-- NoKernelError          there is no kernel to boot guests with
     +-- NoNetworkError         set-up could not reach the package archive
    HarnessError
     +-- CommandError           a program of the host failed
"""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING

from qubes_itests.exc import EnvironmentNotReadyError, HarnessError
from qubes_itests.exit_codes import ExitCode
from qubes_itests.program import typed

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "CommandError",
    "MissingToolError",
    "NoKernelError",
    "NoNetworkError",
]


class MissingToolError(EnvironmentNotReadyError):
    """A program, library or header is not installed.

    :param need: what is missing, as in "mkfs.btrfs".
    :param remedy: the command that installs it; `doctor` otherwise knows.
    """

    exit_code = ExitCode.MISSING_TOOL

    def __init__(self, need: str, remedy: str = "") -> None:
        super().__init__(
            f"{need} is not installed.",
            remedy or f"See: {typed('doctor')}",
        )
        self.need = need


class NoKernelError(EnvironmentNotReadyError):
    """There is no kernel to boot guests with.

    :param reason: where it was looked for.
    :param name: of one that is not the default.
    """

    exit_code = ExitCode.NO_KERNEL

    def __init__(self, reason: str, name: str = "") -> None:
        words = [sys.executable, "-m", "qubes_itests.host.kernel", "fetch", name]
        command = shlex.join(filter(None, words))
        other = "" if name else "; or name one in QUBES_ITESTS_KERNEL"
        super().__init__(
            f"There is no kernel for guests ({reason}).",
            f"Fetch it with: {command}{other}.",
        )


class NoNetworkError(EnvironmentNotReadyError):
    """Set-up could not reach the package archive.

    :param wanted: what was to be downloaded.
    :param reason: the tool's own last words.
    """

    exit_code = ExitCode.NO_NETWORK

    def __init__(self, wanted: str, reason: str) -> None:
        super().__init__(
            f"{wanted} could not be downloaded ({reason}).",
            "Check the network and the package sources, then run this again.",
        )


class CommandError(HarnessError):
    """A program of the host failed.

    :param argv: the command line.
    :param returncode: exit status; a negative signal number if a signal ended it.
    :param stderr: the end of what it wrote to its standard error.
    """

    def __init__(self, argv: Sequence[str], returncode: int, stderr: str) -> None:
        how = (
            f"exit status {returncode}" if returncode >= 0 else f"signal {-returncode}"
        )
        super().__init__(f"{shlex.join(argv)}: {how}: {stderr or '(silent)'}")
        self.argv = tuple(argv)
        self.returncode = returncode
        self.stderr = stderr
