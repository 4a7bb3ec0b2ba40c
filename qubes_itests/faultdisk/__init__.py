"""Disks that fail on purpose, and what a power cut may leave of a filesystem."""

from __future__ import annotations

from qubes_itests.faultdisk.calls import CallFault, failing_call
from qubes_itests.faultdisk.crash import CrashState, choose_states
from qubes_itests.faultdisk.disk import FaultDisk
from qubes_itests.faultdisk.exc import CrashStateError, FaultDiskError
from qubes_itests.faultdisk.explore import Crash, CrashExplorer
from qubes_itests.faultdisk.filesystem import FaultFilesystem
from qubes_itests.faultdisk.operations import Kind, Operation
from qubes_itests.faultdisk.recording import Recording

__all__ = [
    "CallFault",
    "Crash",
    "CrashExplorer",
    "CrashState",
    "CrashStateError",
    "FaultDisk",
    "FaultDiskError",
    "FaultFilesystem",
    "Kind",
    "Operation",
    "Recording",
    "choose_states",
    "failing_call",
]
