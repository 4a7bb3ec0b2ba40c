"""Starting pytest over inside a sandbox, so that nothing of a run survives it."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest

from qubes_itests.exc import HarnessError
from qubes_itests.host import sandbox
from qubes_itests.run.preparation import prepare

if TYPE_CHECKING:
    from qubes_itests.run.settings import Settings

__all__ = ["enter", "wanted"]

#: With these pytest runs no test.
_NO_TESTS = ("collectonly", "showfixtures", "show_fixtures_per_test", "setupplan")


def wanted(config: pytest.Config) -> bool:
    """Return whether this pytest shall start over.

    Only a process that is nothing but a pytest command may be replaced: pytest may
    as well be a function call in a program that has other plans.  Without root the
    tests run here, and the fixtures that need more say so.
    """
    options = config.option
    return (
        not sandbox.active()
        and os.geteuid() == 0
        and not any(getattr(options, name, False) for name in _NO_TESTS)
        and not getattr(options, "help", False)
        and not getattr(options, "version", 0)
        and not hasattr(config, "workerinput")
        and _is_whole_process(config)
    )


def enter(config: pytest.Config, settings: Settings) -> None:
    """Replace this process by the same command in a sandbox; does not return.

    :param settings: what they name is made ready first, where there is a network.
    """
    capture = config.pluginmanager.get_plugin("capturemanager")
    if capture is not None:
        # What pytest captures into must not become the new process's own output.
        capture.stop_global_capturing()
    try:
        prepare(settings)
    except HarnessError as error:
        raise pytest.exit.Exception(str(error), int(error.exit_code)) from None
    sandbox.reexec([sys.executable, *sys.orig_argv[1:]])


def _is_whole_process(config: pytest.Config) -> bool:
    arguments = [str(word) for word in config.invocation_params.args]
    return (
        arguments
        == sys.argv[1:]
        == sys.orig_argv[len(sys.orig_argv) - len(arguments) :]
    )
