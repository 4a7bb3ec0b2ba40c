"""The errors of apps; each concerns one app, and others run.

::

    HarnessError
     +-- SpecError      what it says of templates makes no sense
     +-- InstallError   its plugin could not be installed
"""

from __future__ import annotations

from qubes_itests.exc import HarnessError
from qubes_itests.exit_codes import ExitCode
from qubes_itests.untrusted_text import quoted

__all__ = ["InstallError", "SpecError"]


class SpecError(HarnessError):
    """What an app says of templates makes no sense.

    :param source: the file, and the section in it.
    :param problem: what is wrong, and what would be right.
    """

    exit_code = ExitCode.USAGE_ERROR

    def __init__(self, source: str, problem: str) -> None:
        super().__init__(f"{source}: {problem}")
        self.source = source
        self.problem = problem


class InstallError(HarnessError):
    """The plugin of an app could not be installed.

    :param app: the app's directory.
    :param reason: how it failed.
    :param output: the end of what pip said.
    """

    def __init__(self, app: str, reason: str, output: str = "") -> None:
        # the first line is for who reads no more than that
        said = f"\n{quoted(output)}" if output else ""
        super().__init__(f"the tests of {app} cannot be installed: {reason}{said}")
        self.app = app
        self.reason = reason
        self.output = output
