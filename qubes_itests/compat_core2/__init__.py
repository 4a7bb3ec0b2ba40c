"""The stable, synchronous test interface of Qubes OS.

Plugins import it as ``qubes.tests.extra``.  Test code runs in a thread of its own and
may block; the VMs live on in the event loop's thread.
"""

from __future__ import annotations

from .case import (
    CLSVMPREFIX,
    VMPREFIX,
    ExtraTestCase,
    QubesTestCase,
    SystemTestCase,
)
from .exc import LeakError
from .process import ProcessWrapper
from .vm import VMWrapper

__all__ = [
    "CLSVMPREFIX",
    "VMPREFIX",
    "ExtraTestCase",
    "LeakError",
    "ProcessWrapper",
    "QubesTestCase",
    "SystemTestCase",
    "VMWrapper",
]
