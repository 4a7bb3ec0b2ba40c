"""``compare``: our core beside one under test, as users see it or by tests."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qubes_itests.comparison import compare
from qubes_itests.exit_codes import ExitCode
from qubes_itests.host.command import output
from qubes_itests.program import COMMAND
from qubes_itests.pytest_plugin.run_record import NAME
from qubes_itests.report.merge import read_part
from qubes_itests.run.preparation import told_again
from qubes_itests.run.result import Prepared
from qubes_itests.run.settings import ConfigurationError, load
from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from qubes_itests.cli.arguments import Command
    from qubes_itests.comparison import Difference
    from qubes_itests.run.settings import Settings

__all__ = ["check", "execute"]

_VERDICTS: Final = ("same", "differs", "only there", "only here")
#: How ids of tests begin that are the core's own and run on ours as well.
_SUITES: Final = "core::integ."
#: Kinds of which the same is often there for several classes of VMs.
_OF_CLASSES: Final = ("member", "default", "set")
#: Seconds to describe a core.
_TIMEOUT: Final = 120.0


def check(command: Command, settings: Settings) -> None:
    """Refuse what cannot work, before anything is set up.

    :raise ConfigurationError: no core to compare with, one that both runs would take,
        or tests that are not for both.
    """
    if settings.core is None:
        raise ConfigurationError("compare", "expected --core DIR, got no core")
    if command.expression and not (command.words or settings.app):
        raise ConfigurationError("-k", f"expected --app, or a suite {_SUITES}NAME")
    for word in command.words:
        if not (settings.app or word.startswith(_SUITES)):
            problem = f"expected tests of --app, or of a suite {_SUITES}NAME"
            raise ConfigurationError(word, problem)
    if not command.in_sandbox and load(Path.cwd()).core is not None:
        problem = "expected --core on the command line only: from the environment, or a"
        problem += " file of settings, the run on our core would take it, too"
        raise ConfigurationError("compare", problem)


def execute(command: Command, settings: Settings) -> int:
    """Print the table; the exit status is 0 if both could be looked at."""
    if command.in_sandbox:
        found = compare(_ours(), _theirs(settings))
    else:
        root = settings.artifacts
        ours = dataclasses.replace(
            settings, core=None, qrexec=None, core_suites=settings.core
        )
        found = compare(
            _outcomes(ours, root / "ours", command),
            _outcomes(settings, root / "theirs", command),
        )
    if command.json:
        rows = [{**dataclasses.asdict(d), "verdict": d.verdict} for d in found]
        print(json.dumps(rows, indent=2))
    else:
        for line in _lines(found):
            print(safe_text(line, limit=None))
    return ExitCode.OK


def _ours() -> Mapping[str, str]:
    """Describe our core, in a process that does not find the other one."""
    # it gets no PYTHONPATH, in which the other one is
    program = [sys.executable, "-P", "-m", "qubes_itests.comparison.description"]
    described: dict[str, str] = json.loads(output(program, timeout=_TIMEOUT))
    return described


def _theirs(settings: Settings) -> Mapping[str, str]:
    """Describe the core under test, where it finds all that it uses."""
    # not before: the command line begins without what the sandbox needs
    from qubes_itests.comparison.description import description
    from qubes_itests.discovery.core_suites import core_imports
    from qubes_itests.dom0 import modules
    from qubes_itests.dom0.opening import in_time
    from qubes_itests.run.app_templates import plugins_for
    from qubes_itests.run.context import RunContext

    told = Prepared.told()
    modules.install()
    context = RunContext(settings, plugins_for(settings))
    try:
        with core_imports(
            Path(told.core), Path(told.copies[told.core]), settings.templates
        ):
            context.testbed  # noqa: B018 - is made by this, with dom0
            return in_time("be described", description)
    finally:
        for problem in context.close():
            print(f"left behind: {problem}", file=sys.stderr)


def _outcomes(
    settings: Settings, artifacts: Path, command: Command
) -> Mapping[str, str]:
    """Run tests, and return what came of them, each with the cause if it failed."""
    # a run keeps its results if there is such a folder; those of an earlier one are not
    # to be taken for its own
    artifacts.mkdir(parents=True, exist_ok=True)
    (artifacts / NAME).unlink(missing_ok=True)
    options = [word for given in told_again(settings) for word in given]
    if command.expression:
        options += ["-k", command.expression]
    run = [*COMMAND, "run", *options, "--artifacts", str(artifacts), *command.words]
    subprocess.run(run, check=False, stdout=sys.stderr)
    return {
        f"test {result.test}": f"{result.outcome}: {result.cause}"
        if result.cause
        else result.outcome
        for result in read_part(artifacts).results
    }


def _lines(found: Sequence[Difference]) -> Iterator[str]:
    counts = Counter((each.kind, each.verdict) for each in found)
    yield f"{'':8}" + "".join(f"{verdict:>12}" for verdict in _VERDICTS)
    for kind in dict.fromkeys(each.kind for each in found):
        yield f"{kind:8}" + "".join(f"{counts[kind, v]:12}" for v in _VERDICTS)
    for verdict in _VERDICTS[1:3]:
        # on one line what is alike: in several classes, and for several values
        alike: dict[tuple[str, str, str, str], tuple[dict[str, None], list[str]]] = {}
        for each in found:
            if each.verdict != verdict:
                continue
            owner, _, name = each.name.partition(".")
            if each.kind not in _OF_CLASSES:
                owner, name = "", each.name
            name, _, value = name.partition(" = ")
            key = each.kind, name, _short(each.here), _short(each.there)
            owners, values = alike.setdefault(key, ({}, []))
            owners[owner] = None
            values += [value] if value and value not in values else []
        yield from ("", verdict) if alike else ()
        for (kind, name, here, there), (owners, values) in alike.items():
            of = f" of {', '.join(owners)}" if any(owners) else ""
            to = f" = {', '.join(values)}" if values else ""
            both = f"{here}; there {there}" if verdict == "differs" else there
            yield f"  {kind:8} {name}{of}{to}: {both}"


def _short(text: str | None) -> str:
    """Return the name of an error alone: which classes it is of has been looked at."""
    if text is None:
        return ""
    return " ".join(text.split()[:2]) if text.startswith("! ") else text
