"""``list``: the tests of all installed plugins, without pytest, which takes longer."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from qubes_itests.exit_codes import ExitCode
from qubes_itests.run.plugins import named_plugins, test_ids

if TYPE_CHECKING:
    from qubes_itests.cli.arguments import Command
    from qubes_itests.discovery import Plugin
    from qubes_itests.run.settings import Settings

__all__ = ["execute"]


def execute(command: Command, settings: Settings) -> int:
    """Print them; what a plugin prints while it loads does not get in between."""
    output, sys.stdout = sys.stdout, sys.stderr
    try:
        plugins = named_plugins(settings.templates)
    finally:
        sys.stdout = output
    if command.json:
        rows = [_row(name, plugin) for name, plugin in plugins]
        print(json.dumps({"plugins": rows}, indent=2))
    else:
        print("\n".join(_lines(plugins)))
    return ExitCode.OK


def _row(name: str, plugin: Plugin) -> dict[str, Any]:
    return {
        "name": plugin.name,
        "group": plugin.group,
        "target": plugin.target,
        "distribution": plugin.distribution,
        "problems": [str(problem) for problem in plugin.problems],
        "tests": [
            {"id": test, "template": template}
            for test, template in test_ids(name, plugin)
        ],
    }


def _lines(plugins: list[tuple[str, Plugin]]) -> list[str]:
    if not plugins:
        return [
            "No test plugin is installed. Install one, for example:",
            "  python -m pip install ./plugins/smoke",
        ]
    lines = []
    for name, plugin in plugins:
        lines += [f"# {name}: {plugin.target or plugin.name} ({plugin.distribution})"]
        lines += [f"#   problem: {problem.summary}" for problem in plugin.problems]
        lines += [test for test, _ in test_ids(name, plugin)]
    return lines
