"""The command line.

What needs a sandbox starts over in one: until then little may be imported, since it
is imported again.  So each sub-command is a separate module, loaded when it is used.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qubes_itests.cli.arguments import parse
from qubes_itests.core.exc import QubesException
from qubes_itests.exc import HarnessError
from qubes_itests.exit_codes import ExitCode
from qubes_itests.program import NAME
from qubes_itests.run.settings import load
from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qubes_itests.cli.arguments import Command
    from qubes_itests.run.settings import Settings

__all__ = ["command_line"]


def command_line(arguments: Sequence[str]) -> int:
    """Do what the arguments say, and return the exit status.

    :param arguments: what follows the program's name.
    """
    try:
        command = parse(arguments)
        settings = load(Path.cwd(), os.environ, command.given)
        module = importlib.import_module(f"qubes_itests.cli.{command.module}")
        if check := getattr(module, "check", None):
            check(command, settings)
        if command.in_sandbox:
            _enter_sandbox(command, settings)
        elif command.shows_tests and (
            settings.app or settings.core or settings.core_suites
        ):
            from qubes_itests.run.preparation import prepare_listing

            settings = prepare_listing(settings)
        return int(module.execute(command, settings))
    except (HarnessError, QubesException) as error:
        # it may say what guests have said, or a folder that is anybody's
        text = safe_text(str(error), lines=True, limit=None)
        print(f"{NAME}: {text}", file=sys.stderr)
        if isinstance(error, HarnessError):
            return int(error.exit_code)
        return ExitCode.INTERNAL_ERROR
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); Python would flush it once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _prepare(command: Command, settings: Settings) -> None:
    """Make ready what takes the network, which the sandbox has not."""
    from qubes_itests.host.cache import Cache
    from qubes_itests.host.preflight import require_ready

    # First: what follows may take minutes, and mounts images.
    require_ready(Cache())
    if command.name == "thaw":
        return  # all that its VMs need is in the folder
    if set(settings.template) - {"tiny"}:
        from qubes_itests.run.app_templates import plugins_for
        from qubes_itests.run.hooks import offers
        from qubes_itests.run.settings import ConfigurationError

        known = offers(plugins_for(settings), "templates")
        there = ", ".join(known)
        for name in settings.template:
            if name not in known:
                reason = f"expected one of {there}; got {name!r}"
                raise ConfigurationError("--template", reason)
    from qubes_itests.run.preparation import prepare

    prepare(settings, [command.target] if command.name == "shell" else ())


def _enter_sandbox(command: Command, settings: Settings) -> None:
    from qubes_itests.host import sandbox

    if not sandbox.active():
        _prepare(command, settings)
    # -P keeps files of the current directory from being taken for modules, as they are
    # not here unless Python was asked for our module there: it begins anew in the
    # sandbox.
    safe = [] if str(Path.cwd()) in sys.path else ["-P"]
    sandbox.reexec([sys.executable, *safe, "-m", "qubes_itests", *command.arguments])
