"""``repl``: a Python prompt with what a test has."""

from __future__ import annotations

import code
import contextlib
import linecache
import sys
import unittest
from pathlib import Path
from typing import TYPE_CHECKING

from qubes_itests.exit_codes import ExitCode
from qubes_itests.report.failures import state
from qubes_itests.run.plugins import meant, named_plugins, test_ids
from qubes_itests.run.result import Prepared

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from qubes_itests.cli.arguments import Command
    from qubes_itests.compat_core2 import VMWrapper
    from qubes_itests.run.context import RunContext
    from qubes_itests.run.settings import Settings

__all__ = ["execute"]

_BANNER = """\
app         an app of your own, with the templates of the run
create_vms  makes VMs, as in a test: one, two = create_vms(["one", "two"])
            one.start(); one.run("exit 3", wait=True); one.succeed("id")
vm_factory  makes a VM and starts it: vm = vm_factory("work")
portal      awaits for you: portal.run(vm.shutdown())
tests       the classes of the tests, by id; run_test(ID) runs those that begin so
reload      loads them again, as they are in your files now: reload()
Ctrl-D ends the VMs, and leaves nothing."""
#: Lines that are remembered for the next time, in the same directory.
_HISTORY_LENGTH = 1000


def execute(_command: Command, settings: Settings) -> int:
    """Read, evaluate and print until the end of the input."""
    # not before: the command line begins without what the sandbox needs
    from qubes_itests.run.app_templates import plugins_for
    from qubes_itests.run.context import RunContext

    context = RunContext(settings, plugins_for(settings))
    try:
        names = _names(context)
        with _editing(names, state(context.cache.root) / "repl-history"):
            code.interact(_BANNER, local=names, exitmsg="ending: the VMs are killed")
    except SystemExit as ended:  # exit() at the prompt
        return ended.code if isinstance(ended.code, int) else ExitCode.OK
    finally:
        for problem in context.close():
            print(f"left behind: {problem}", file=sys.stderr)
    return ExitCode.OK


def _names(context: RunContext) -> dict[str, object]:
    """Return what there is at the prompt."""
    from qubes_itests.fixtures.session import vm_maker

    portal, templates = context.portal, context.settings.templates
    app = portal.run(context.testbed.make_app(*templates))
    make = vm_maker(app, portal)

    def create_vms(names: Iterable[str]) -> list[VMWrapper]:
        """Make AppVMs, of these very names: those in tests get a prefix.

        So a test can run while there are such VMs.
        """
        return [make(name, start=False) for name in names]

    tests = _Tests(templates)
    tests.load()
    return {
        "app": app,
        "create_vms": create_vms,
        "vm_factory": make,
        "portal": portal,
        "tests": tests.classes,
        "run_test": tests.run,
        "reload": tests.reload,
    }


@contextlib.contextmanager
def _editing(names: dict[str, object], history: Path) -> Iterator[None]:
    """Have lines edited, completed and remembered, if somebody types them."""
    if not sys.stdin.isatty():
        yield
        return
    # by being imported it has `input` edit lines
    import readline
    import rlcompleter

    readline.set_completer(rlcompleter.Completer(names).complete)
    readline.parse_and_bind("tab: complete")
    with contextlib.suppress(OSError):  # there is none yet
        readline.read_history_file(history)
    try:
        yield
    finally:
        readline.set_history_length(_HISTORY_LENGTH)
        try:
            history.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(history)
        except OSError as error:
            print(f"what was typed is not kept: {error}", file=sys.stderr)


class _Tests:
    """The tests of the run, at the prompt.

    :param templates: for the classes that are run once per template.
    """

    def __init__(self, templates: Sequence[str]) -> None:
        self._templates = templates
        self._packages: set[str] = set()
        #: By id; the same dictionary, whenever they are loaded.
        self.classes: dict[str, type[unittest.TestCase]] = {}

    def load(self) -> None:
        """Find them, and say what is wrong with those that cannot be loaded."""
        self.classes.clear()
        for name, plugin in named_plugins(self._templates):
            self._packages.add(plugin.target.partition(":")[0].partition(".")[0])
            for problem in plugin.problems:
                print(f"{name}: {problem}")
            by_class = {entry.name: entry.cls for entry in plugin.classes}
            for test, _ in test_ids(name, plugin):
                if cls := by_class.get(test.split("::")[1]):
                    self.classes[test] = cls

    def reload(self) -> None:
        """Load the tests again, from what their authors have made of their files."""
        copies = [Path(packages) for packages in Prepared.told().copies]
        for name, module in tuple(sys.modules.items()):
            # None for a module that somebody has blocked
            file = getattr(module, "__file__", None)
            installed = file and any(map(Path(file).is_relative_to, copies))
            if installed or name.partition(".")[0] in self._packages:
                del sys.modules[name]
        linecache.checkcache()
        self.load()
        print(f"{len(self.classes)} tests")

    def run(self, test: str) -> None:
        """Run tests.

        :param test: an id, or the beginning of one.
        :raise LookupError: there is no such test.
        """
        if not (names := meant(test, list(self.classes))):
            raise LookupError(f"no test's id begins with {test!r}")
        suite = unittest.TestSuite(
            self.classes[name](name.split("::")[2]) for name in names
        )
        unittest.TextTestRunner(sys.stdout, verbosity=2).run(suite)
