"""``report``: the failures of the last run in this directory once more."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qubes_itests.exit_codes import ExitCode
from qubes_itests.host.cache import Cache
from qubes_itests.report import failures
from qubes_itests.report.failures import COMMAND, last_run

if TYPE_CHECKING:
    from qubes_itests.cli.arguments import Command
    from qubes_itests.run.settings import Settings

__all__ = ["execute"]


def execute(_command: Command, _settings: Settings) -> int:
    """Print them; the exit status is that of a run with them."""
    found = failures.load(last_run(Cache().root))
    if found is None:
        print("No run in this directory has ended yet.")  # noqa: T201
        return ExitCode.NO_TESTS_COLLECTED
    if not found:
        print("The last run in this directory had no failures.")  # noqa: T201
        return ExitCode.OK
    failures.show(found, COMMAND, print, limit=len(found))
    return ExitCode.TESTS_FAILED
