"""``doctor``: each need of a run, whether it is met, and the command that meets it."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Literal

from qubes_itests.exc import EnvironmentNotReadyError, HarnessError
from qubes_itests.exit_codes import ExitCode
from qubes_itests.host import memory
from qubes_itests.host.cache import Cache
from qubes_itests.host.kernel import find_kernel
from qubes_itests.host.packages import find_program
from qubes_itests.host.preflight import Check, check_all
from qubes_itests.hypervisor.kvm import EMULATOR, kvm_usable
from qubes_itests.hypervisor.shared_memory import build_memory_library
from qubes_itests.report.names import one_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from qubes_itests.cli.arguments import Command
    from qubes_itests.run.settings import Settings

__all__ = ["execute"]

_COLOURS = {"ok": "\033[32m", "warn": "\033[33m", "fail": "\033[31m"}


def execute(command: Command, _settings: Settings) -> int:
    """Print them; the exit status is that of a run on this machine."""
    checks = [*check_all(), *_facts()]
    failed = [check for check in checks if check.state == "fail"]
    if command.json:
        print(json.dumps([check.as_dict() for check in checks], indent=2))
    else:
        print("\n".join(_lines(checks)))
        print(_verdict(failed))
    return failed[0].exit_code if failed else ExitCode.OK


def _facts() -> Iterator[Check]:
    """Yield what is no need of a run, and decides how fast it is."""
    try:
        cache = Cache()
        verdict = kvm_usable(cache, find_kernel(cache).image)
        how = "guests use it" if verdict.usable else "guests are emulated"
        state: Literal["ok", "warn"] = "ok" if verdict.usable else "warn"
        yield Check("KVM", state, f"{how}: {one_line(verdict.reason, 120)}")
        content = cache.content()
    except (EnvironmentNotReadyError, OSError):
        return  # what is missing has been told
    yield Check("memory", "ok", f"{memory.for_vms()} MiB for VMs")
    if emulator := find_program(EMULATOR):
        name = "shared memory"
        try:
            build_memory_library(cache, emulator)
        except HarnessError as error:
            message = f"each VM has a copy of all that it begins with: {error}"
            yield Check(name, "warn", one_line(message, 240))
        else:
            message = "VMs have in common what they begin with and do not change"
            yield Check(name, "ok", message)
    kinds = {entry.kind for entry in content}
    # what templates are made of has no entry of its own
    built = sorted(kinds & {"tiny", "debian", "layer"})
    yield Check("templates", "ok", f"built: {', '.join(built) or 'none yet'}")
    size, limit = sum(entry.size for entry in content), cache.limit
    yield Check("cache size", "ok", f"{size >> 20} MiB of {limit >> 20} MiB")


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
