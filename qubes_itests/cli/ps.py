"""``ps``: the runs under way, the tests that they are at, and their VMs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from qubes_itests.exc import HarnessError
from qubes_itests.exit_codes import ExitCode
from qubes_itests.host.cache import Cache
from qubes_itests.report.heartbeat import duration
from qubes_itests.serve.reach import under_way
from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qubes_itests.cli.arguments import Command
    from qubes_itests.run.settings import Settings

__all__ = ["execute"]


def execute(command: Command, _settings: Settings) -> int:
    """Print them; one that does not answer is no error of those that do."""
    found: dict[str, dict[str, Any]] = {}
    for reached in under_way(Cache()):
        try:
            found[reached.name] = reached.status()
        except HarnessError as error:
            found[reached.name] = {"error": str(error), "vms": []}
    if command.json:
        print(json.dumps(found, indent=2))
    elif not found:
        print("No run is under way.")
    else:
        for name, status in found.items():
            for line in _lines(name, status):
                print(safe_text(line, limit=None))
    return ExitCode.OK


def _lines(name: str, status: dict[str, Any]) -> Iterator[str]:
    if error := status.get("error"):
        yield error
        return
    yield f"{name}  pid {status['pid']}  {status.get('directory', 'serve')}"
    if test := status.get("test"):
        stopped = ", its deadline stands still" if status.get("stopped") else ""
        yield f"  {test}: {status['phase']}, {duration(status['seconds'])}{stopped}"
        yield f"  at {status['waits']}"
    elif "test" in status:
        yield "  no test has begun, or the last one has ended"
    for vm in status["vms"]:
        memory = "" if vm["memory"] is None else f"{vm['memory']:6} MiB"
        yield f"    {vm['name']:31} {vm['state']:10} {memory}".rstrip()
