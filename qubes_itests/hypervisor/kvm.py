"""Probe of hardware virtualisation: does it work here, found out by using it.

A /dev/kvm that exists, and opens, may still abort or hang every guest (nested
virtualisation that is only half there). So a kernel is booted with it, to the point
where it finds no root filesystem.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qubes_itests.host.cache import digest
from qubes_itests.host.packages import find_program

if TYPE_CHECKING:
    from qubes_itests.host.cache import Cache

__all__ = ["EMULATOR", "Verdict", "kvm_usable"]

#: The program that runs guests.
EMULATOR = "qemu-system-x86_64"

#: Seconds that the probe may take; where KVM works it takes about one.
DEADLINE = 8.0

_DEVICE = Path("/dev/kvm")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PROOF = b"Unable to mount root fs"
_OPTIONS = "console=ttyS0 panic=-1"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of the probe.

    :param usable: whether guests may use KVM.
    :param reason: why, or why not, in a few words.
    """

    usable: bool
    reason: str


def kvm_usable(cache: Cache, kernel: Path, *, deadline: float = DEADLINE) -> Verdict:
    """Tell whether KVM works on this host. Blocking, up to `deadline` once per boot.

    :param cache: keeps the verdict until the host boots again.
    :param kernel: image of the kernel that is booted.
    :param deadline: seconds until a probe that shows nothing has failed.

    QUBES_ITESTS_KVM=1 or =0 in the environment is the verdict, with no probe.
    """
    value = os.environ.get("QUBES_ITESTS_KVM", "")
    if value in ("0", "1"):
        return Verdict(usable=value == "1", reason=f"QUBES_ITESTS_KVM={value} says so")
    emulator = find_program(EMULATOR)
    if emulator is None:
        return Verdict(usable=False, reason=f"{EMULATOR} is not installed")
    if not os.access(_DEVICE, os.R_OK | os.W_OK):
        return Verdict(usable=False, reason=f"{_DEVICE} is missing or not ours to use")
    key = digest(_BOOT_ID.read_text(), str(emulator), kernel)

    def build(place: Path) -> None:
        verdict = _probe(str(emulator), kernel, deadline)
        (place / "verdict.json").write_text(json.dumps(asdict(verdict)))

    entry = cache.entry("kvm", key, build)
    return Verdict(**json.loads((entry / "verdict.json").read_text()))


def _probe(emulator: str, kernel: Path, deadline: float) -> Verdict:
    # QEMU may abort here: without a core file.
    argv = ["prlimit", "--core=0", emulator]
    argv += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    argv += ["-machine", "q35,accel=kvm", "-cpu", "host", "-m", "128"]
    argv += ["-serial", "stdio"]
    argv += ["-kernel", str(kernel), "-append", _OPTIONS]
    try:
        # On a timeout it is killed and reaped.
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=deadline,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Verdict(usable=False, reason=f"a guest hung for {deadline:g} s")
    if _PROOF in done.stdout:
        return Verdict(usable=True, reason="a kernel booted")
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    words = lines[-1] if lines else f"QEMU exited with status {done.returncode}"
    # where in QEMU's own sources it gave up is no news to anybody here
    words = re.sub(r"^(?:qemu[\w-]*: )?(?:\S+\.c:\d+: )?", "", words)
    return Verdict(usable=False, reason=f"KVM boots no guest: {words[:200]}")
