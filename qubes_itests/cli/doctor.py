"""``doctor``: each need of a run, whether it is met, and the command that meets it."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from qubes_itests.exit_codes import ExitCode
from qubes_itests.host.preflight import check_all

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qubes_itests.cli.arguments import Command
    from qubes_itests.host.preflight import Check
    from qubes_itests.run.settings import Settings

__all__ = ["execute"]

_COLOURS = {"ok": "\033[32m", "warn": "\033[33m", "fail": "\033[31m"}


def execute(command: Command, _settings: Settings) -> int:
    """Print them; the exit status is that of a run on this machine."""
    checks = check_all()
    failed = [check for check in checks if check.state == "fail"]
    if command.json:
        print(json.dumps([check.as_dict() for check in checks], indent=2))
    else:
        print("\n".join(_lines(checks)))
        print(_verdict(failed))
    return failed[0].exit_code if failed else ExitCode.OK


def _lines(checks: Sequence[Check]) -> list[str]:
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        state = check.state.ljust(4)
        if sys.stdout.isatty():
            state = f"{_COLOURS[check.state]}{state}\033[0m"
        lines.append(f"{state}  {check.name:{width}}  {check.message}")
        if check.remedy:
            lines.append(f"      {'':{width}}  -> {check.remedy}")
    return lines


def _verdict(failed: Sequence[Check]) -> str:
    if not failed:
        return "\nThis machine can run the tests."
    names = ", ".join(check.name for check in failed)
    return f"\nTests cannot run here until this is fixed: {names}."
