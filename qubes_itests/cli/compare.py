"""``compare``: our core beside one under test, as users see it or by tests."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qubes_itests.comparison import compare
from qubes_itests.discovery.core_suites import suite_names
from qubes_itests.exit_codes import ExitCode
from qubes_itests.host.command import output
from qubes_itests.host.confined import FOLLOW_US
from qubes_itests.host.sandbox import interruptible
from qubes_itests.program import COMMAND, NAME
from qubes_itests.pytest_plugin.run_record import NAME as RUN_RECORD
from qubes_itests.report.merge import read_part
from qubes_itests.report.result_file import HistoryError
from qubes_itests.run.preparation import told_again
from qubes_itests.run.result import Prepared
from qubes_itests.run.settings import ConfigurationError, load
from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from qubes_itests.cli.arguments import Command
    from qubes_itests.comparison import Difference
    from qubes_itests.report.results import TestResult
    from qubes_itests.run.settings import Settings

__all__ = ["check", "execute"]

_VERDICTS: Final = ("same", "differs", "only there", "only here")
_HEADER: Final = f"{'passed/failed/skipped':30}{'ours':>17}{'theirs':>17}" + "".join(
    f"{verdict:>12}" for verdict in _VERDICTS
)
#: How ids of tests begin that are the core's own and run on ours as well.
_SUITES: Final = "core::integ."
#: What tests of apps are called, which run together.
_APPS: Final = "apps"
#: Of a run without results: there were no tests, as where only one core has them.
_EMPTY: Final = (ExitCode.OK, ExitCode.NO_TESTS_COLLECTED)
#: Of one with the results of all its tests.
_WHOLE: Final = (
    *_EMPTY,
    ExitCode.TESTS_FAILED,
    *range(ExitCode.LEAKED_RESOURCE, ExitCode.FLAKY + 1),
)
#: After these the next run would end like the last.
_FOR_ALL: Final = (
    ExitCode.USAGE_ERROR,
    *range(ExitCode.NOT_ROOT, ExitCode.LEAKED_RESOURCE),
)
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
    if not command.in_sandbox:
        return _Trials(command, settings).execute()
    found = compare(_ours(), _theirs(settings))
    _print(_json(found) if command.json else [*_counts(found), *_listed(found)])
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


class _Trials:
    """Tests on both cores: those of an app together, and each suite by itself.

    So a suite that does not come to an end leaves the others as they are.

    :param command: says which.
    :param settings: of the run on the core under test.
    """

    def __init__(self, command: Command, settings: Settings) -> None:
        self._command = command
        self._settings = settings
        # our own templates have what dom0's have only for suites
        self._plain = dataclasses.replace(settings, core=None, qrexec=None)
        self._found: list[Difference] = []

    def execute(self) -> int:
        """Run them, print a line for each as soon as it has ended, then differences.

        :return: the status of the first run that did not come to its end, else 0.
        """
        parts = _parts(self._command, self._settings)
        self._show(_HEADER)
        ended = int(ExitCode.OK)
        try:
            with interruptible():
                for name, words in parts.items():
                    status = self._compare(name, words)
                    ended = ended or status
                    if status in _FOR_ALL:
                        break
        except KeyboardInterrupt:
            # what there is by then took long
            ended = ExitCode.INTERRUPTED
        _print(_json(self._found) if self._command.json else _listed(self._found))
        return ended

    def _compare(self, name: str, words: Sequence[str]) -> int:
        """Run a part on both cores.

        :return: the status of a run that did not come to its end, else 0.
        """
        suites = self._settings.core if name.startswith(_SUITES) else None
        both = {
            "ours": dataclasses.replace(self._plain, core_suites=suites),
            "theirs": self._settings,
        }
        outcomes: list[Mapping[str, str]] = []
        row = f"{name:30}"
        for side, settings in both.items():
            artifacts = self._settings.artifacts / side / name.removeprefix("core::")
            status, results = self._run(settings, artifacts, words)
            if status not in (_WHOLE if results else _EMPTY):
                count = len(results) or "none"
                why = f"the run on {side} ended with status {status}"
                why += f", and {count} of its results"
                self._show(f"{row}  {why}")
                print(f"{NAME}: {name}: {why}: see above", file=sys.stderr)
                return status
            outcomes.append({f"test {each.test}": _outcome(each) for each in results})
            row += f"{_summary(results):>17}"
        found = compare(*outcomes)
        counts = Counter(each.verdict for each in found)
        self._show(row + "".join(f"{counts[verdict]:12}" for verdict in _VERDICTS))
        self._found += found
        return ExitCode.OK

    def _show(self, line: str) -> None:
        """Print a line of the table, in place of which JSON has what it is made of."""
        if not self._command.json:
            _print([line])

    def _run(
        self, settings: Settings, artifacts: Path, words: Sequence[str]
    ) -> tuple[int, Sequence[TestResult]]:
        """Run tests, or take what an earlier run of the same has left.

        :return: the status, and the results.
        """
        options = [word for given in told_again(settings) for word in given]
        if self._command.expression:
            options += ["-k", self._command.expression]
        # in a worker, so that a core which ends its process ends one test
        options += ["-n", self._command.numprocesses, "--artifacts", str(artifacts)]
        run = ["run", *options, *words]
        if self._command.resume:
            with contextlib.suppress(HistoryError):
                left = read_part(artifacts)
                same = list(left.document.get("command", ()))[-len(run) :] == run
                if same and left.results and left.run.outcome != "interrupted":
                    return ExitCode.OK, left.results
        # a run keeps its results if there is such a folder; those of an earlier one are
        # not to be taken for its own
        artifacts.mkdir(parents=True, exist_ok=True)
        (artifacts / RUN_RECORD).unlink(missing_ok=True)
        words = [*FOLLOW_US, *COMMAND, *run]
        with subprocess.Popen(words, stdout=sys.stderr) as process:
            try:
                status = process.wait()
            except KeyboardInterrupt:
                # Ctrl-C has reached it as well, and SIGTERM has not
                process.terminate()
                process.wait()
                raise
        there = (artifacts / RUN_RECORD).is_file()
        return status, read_part(artifacts).results if there else ()


def _parts(command: Command, settings: Settings) -> Mapping[str, Sequence[str]]:
    """Return the words by what is run at once: a suite, or tests of apps.

    :raise ConfigurationError: a word means no suite.
    """
    core = settings.core or Path()
    suites = [f"core::{name}" for name in suite_names(core)]
    suites = [suite for suite in suites if suite.startswith(_SUITES)]
    parts: dict[str, list[str]] = {} if command.words else {_APPS: []}
    for word in command.words:
        suite = "::".join(word.split("::")[:2])
        if not word.startswith(_SUITES):
            parts.setdefault(_APPS, []).append(word)
        elif suite in suites:
            parts.setdefault(suite, []).append(word)
        elif meant := [each for each in suites if each.startswith(word)]:
            for each in meant:
                parts.setdefault(each, []).append(each)
        else:
            there = ", ".join(each.removeprefix("core::") for each in suites)
            problem = f"expected a suite of {core}, which has {there or 'none'}"
            raise ConfigurationError(word, problem)
    return parts


def _outcome(result: TestResult) -> str:
    return f"{result.outcome}: {result.cause}" if result.cause else result.outcome


def _summary(results: Sequence[TestResult]) -> str:
    bad = sum(result.bad for result in results)
    skipped = sum(result.outcome == "skipped" for result in results)
    seconds = sum(result.duration for result in results)
    return f"{len(results) - bad - skipped}/{bad}/{skipped} {seconds:6.0f} s"


def _json(found: Sequence[Difference]) -> list[str]:
    rows = [{**dataclasses.asdict(d), "verdict": d.verdict} for d in found]
    return json.dumps(rows, indent=2).splitlines()


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(safe_text(line, limit=None), flush=True)


def _counts(found: Sequence[Difference]) -> Iterator[str]:
    counts = Counter((each.kind, each.verdict) for each in found)
    yield f"{'':8}" + "".join(f"{verdict:>12}" for verdict in _VERDICTS)
    for kind in dict.fromkeys(each.kind for each in found):
        yield f"{kind:8}" + "".join(f"{counts[kind, v]:12}" for v in _VERDICTS)


def _listed(found: Sequence[Difference]) -> Iterator[str]:
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
    bad = [each for each in found if each.failed_on_both]
    yield from ("", "failed on both") if bad else ()
    for each in bad:
        yield f"  {each.kind:8} {each.name}: {each.here}; there {each.there}"


def _short(text: str | None) -> str:
    """Return the name of an error alone: which classes it is of has been looked at."""
    if text is None:
        return ""
    return " ".join(text.split()[:2]) if text.startswith("! ") else text
