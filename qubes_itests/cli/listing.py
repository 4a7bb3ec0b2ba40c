"""``list``: the tests of all installed plugins, without pytest, which takes longer."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from qubes_itests.exit_codes import ExitCode
from qubes_itests.run.plugins import meant, named_plugins, test_ids
from qubes_itests.run.settings import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qubes_itests.cli.arguments import Command
    from qubes_itests.discovery import Plugin
    from qubes_itests.run.settings import Settings

__all__ = ["execute"]


def execute(command: Command, settings: Settings) -> int:
    """Print them; what a plugin prints while it loads does not get in between."""
    output, sys.stdout = sys.stdout, sys.stderr
    try:
        plugins = named_plugins(settings.templates, command.words)
    finally:
        sys.stdout = output
    tests = {name: list(test_ids(name, plugin)) for name, plugin in plugins}
    if command.words or command.expression:
        chosen = _chosen(command, [test for all_ in tests.values() for test, _ in all_])
        tests = {n: [pair for pair in t if pair[0] in chosen] for n, t in tests.items()}
        plugins = [(name, plugin) for name, plugin in plugins if tests[name]]
    if command.json:
        rows = [_row(plugin, tests[name]) for name, plugin in plugins]
        print(json.dumps({"plugins": rows}, indent=2))
    else:
        print("\n".join(_lines(plugins, tests)))
    return ExitCode.OK


def _chosen(command: Command, ids: Sequence[str]) -> set[str]:
    """Return the ids that the words and the expression of a command leave.

    :raise ConfigurationError: a word means no test, or the expression is none.
    """
    chosen = set(ids) if not command.words else set()
    for word in command.words:
        found = meant(word.rstrip(":/"), ids)
        if not found:
            problem = f"expected the beginning of a test's id, got {word!r}"
            raise ConfigurationError("list", problem)
        chosen.update(found)
    if command.expression:
        # its grammar is pytest's, which takes a third of a second to load
        from _pytest.mark.expression import Expression

        try:
            compiled = Expression.compile(command.expression)
        except SyntaxError as error:
            raise ConfigurationError("-k", str(error)) from None
        chosen = {
            test
            for test in chosen
            if compiled.evaluate(lambda name, /, t=test, **_: name.lower() in t.lower())
        }
    return chosen


def _row(plugin: Plugin, tests: Sequence[tuple[str, str | None]]) -> dict[str, Any]:
    return {
        "name": plugin.name,
        "group": plugin.group,
        "target": plugin.target,
        "distribution": plugin.distribution,
        "problems": [str(problem) for problem in plugin.problems],
        "tests": [{"id": test, "template": template} for test, template in tests],
    }


def _lines(
    plugins: Sequence[tuple[str, Plugin]],
    tests: Mapping[str, Sequence[tuple[str, str | None]]],
) -> list[str]:
    if not tests:
        return [
            "No test plugin is installed. Install one, for example:",
            "  python -m pip install ./plugins/smoke",
        ]
    lines = []
    for name, plugin in plugins:
        lines += [f"# {name}: {plugin.target or plugin.name} ({plugin.distribution})"]
        lines += [f"#   problem: {problem.summary}" for problem in plugin.problems]
        lines += [test for test, _ in tests[name]]
    return lines
