"""The checks behind ``doctor``, and those that a run begins with."""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qubes_itests.exc import EnvironmentNotReadyError
from qubes_itests.exit_codes import ExitCode
from qubes_itests.host import packages, sandbox
from qubes_itests.host.cache import Cache
from qubes_itests.host.command import run
from qubes_itests.host.exc import CommandError, MissingToolError
from qubes_itests.host.kernel import find_kernel
from qubes_itests.host.loop import LoopDevice, no_loop_device, require_loop_devices

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Check", "check_all", "require_ready"]

_LEAST_SPACE = 4 << 30


@dataclass(frozen=True)
class Check:
    """What became of one check."""

    #: What was checked, as in "mkfs.btrfs".
    name: str
    state: Literal["ok", "warn", "fail"]
    #: What was found.
    message: str
    #: The command or act that mends it; empty if there is nothing to mend.
    remedy: str = ""
    #: With which exit status a run would end because of it.
    exit_code: int = ExitCode.OK

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


def check_all(cache: Cache | None = None) -> list[Check]:
    """Check all that a run needs, in the order in which it should be mended.

    :param cache: the cache that runs would use; by default the usual one.
    """
    checks = [
        _outcome("root", sandbox.require_root),
        _outcome("loop devices", _try_loop_device_as_runs_do),
        _outcome("namespaces", _try_sandbox),
        *(_check_need(need) for need in packages.needs_here()),
        _outcome("cache", lambda: str((cache or Cache()).root)),
        _outcome(
            "kernel for guests",
            lambda: "{0.version} ({0.image})".format(find_kernel(cache or Cache())),
        ),
    ]
    if checks[-2].state == "ok":
        root = (cache or Cache()).root
        free = shutil.disk_usage(root).free
        message, remedy = f"{free / (1 << 30):.1f} GiB free in {root}", ""
        if free < _LEAST_SPACE:
            remedy = "Free some, or name another place in QUBES_ITESTS_CACHE."
        checks.append(Check("disk space", "warn" if remedy else "ok", message, remedy))
    return checks


def require_ready(cache: Cache) -> None:
    """Check in a few milliseconds what a run needs; the first lack ends it.

    :raises EnvironmentNotReadyError: the subclass says what is missing.
    """
    sandbox.require_root()
    require_loop_devices()
    missing = [need for need in packages.needs_here() if not need.present()]
    if missing:
        raise _missing(missing)
    find_kernel(cache)


def try_loop_device() -> str:
    """Attach a loop device to a file, for real, and return its name.

    The device detaches itself when this process closes it, however it ends.

    :raises EnvironmentNotReadyError: it could not be attached.
    """
    with tempfile.NamedTemporaryFile() as image:
        image.truncate(1 << 20)
        with LoopDevice(Path(image.name)) as device:
            return str(device.path)


def _try_loop_device_as_runs_do() -> str:
    if sandbox.active():
        return try_loop_device()
    require_loop_devices()
    # in a sandbox, where nodes are made that this machine's /dev has not
    code = f"from {__name__} import try_loop_device; print(try_loop_device())"
    try:
        command = sandbox.command([sys.executable, "-P", "-c", code])
        return run(command, timeout=20).strip()
    except CommandError as error:
        raise no_loop_device(error.stderr.splitlines()[-1]) from error


def _try_sandbox() -> str:
    if sandbox.active():
        return "in a sandbox now"
    sandbox.require_root()
    try:
        run(sandbox.command(["true"]), timeout=20)
    except CommandError as error:
        sentence = error.stderr.removeprefix("qubes_itests: ")
        problem, _, remedy = sentence.partition(". ")
        code = ExitCode.NO_SANDBOX
        raise EnvironmentNotReadyError(f"{problem}.", remedy, code) from error
    return "mount, PID, network, IPC"


def _check_need(need: packages.Need) -> Check:
    if need.present():
        return Check(need.label, "ok", need.purpose)
    error = _missing([need])
    message = f"missing; it {need.purpose}"
    return Check(need.label, "fail", message, error.remedy, error.exit_code)


def _missing(missing: list[packages.Need]) -> MissingToolError:
    labels = ", ".join(need.label for need in missing)
    command = packages.install_command(missing)
    return MissingToolError(labels, f"Install it with: {command}")


def _outcome(name: str, probe: Callable[[], str | None]) -> Check:
    try:
        return Check(name, "ok", probe() or "yes")
    except EnvironmentNotReadyError as error:
        return Check(name, "fail", error.problem, error.remedy, error.exit_code)
