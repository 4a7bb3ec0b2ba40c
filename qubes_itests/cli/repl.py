"""``repl``: a Python prompt with what a test has."""

from __future__ import annotations

import code
import sys
from typing import TYPE_CHECKING

from qubes_itests.exit_codes import ExitCode

if TYPE_CHECKING:
    from qubes_itests.cli.arguments import Command
    from qubes_itests.run.settings import Settings

__all__ = ["execute"]

_BANNER = """\
app         an app of your own, with the templates of the run
vm_factory  makes a VM and starts it: vm = vm_factory("work")
            vm.run("id -u", wait=True, passio_popen=True)
portal      awaits for you: portal.run(vm.shutdown())
Ctrl-D ends the VMs, and leaves nothing."""


def execute(_command: Command, settings: Settings) -> int:
    """Read, evaluate and print until the end of the input."""
    # not before: the command line begins without what the sandbox needs
    from qubes_itests.fixtures.session import vm_maker
    from qubes_itests.run.app_templates import plugins_for
    from qubes_itests.run.context import RunContext

    context = RunContext(settings, plugins_for(settings))
    try:
        portal = context.portal
        app = portal.run(context.testbed.make_app(*settings.templates))
        names: dict[str, object] = {
            "app": app,
            "vm_factory": vm_maker(app, portal),
            "portal": portal,
        }
        if sys.stdin.isatty():
            # By being imported it has `input` edit lines, and remember them.
            import readline
            import rlcompleter

            readline.set_completer(rlcompleter.Completer(names).complete)
            readline.parse_and_bind("tab: complete")
        code.interact(_BANNER, local=names, exitmsg="ending: the VMs are killed")
    except SystemExit as ended:  # exit() at the prompt
        return ended.code if isinstance(ended.code, int) else ExitCode.OK
    finally:
        for problem in context.close():
            print(f"left behind: {problem}", file=sys.stderr)
    return ExitCode.OK
