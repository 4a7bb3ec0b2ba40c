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
from .emitter import TestEmitter
from .exc import LeakError
from .process import ProcessWrapper
from .templates import (
    create_testcases_for_templates,
    expectedFailureIfTemplate,
    in_dom0,
    list_templates,
    maybe_create_testcases_on_import,
    skipIfTemplate,
    skipUnlessDom0,
    skipUnlessEnv,
    skipUnlessGit,
)
from .vm import VMWrapper

__all__ = [
    "CLSVMPREFIX",
    "VMPREFIX",
    "ExtraTestCase",
    "LeakError",
    "ProcessWrapper",
    "QubesTestCase",
    "SystemTestCase",
    "TestEmitter",
    "VMWrapper",
    "create_testcases_for_templates",
    "expectedFailureIfTemplate",
    "in_dom0",
    "list_templates",
    "maybe_create_testcases_on_import",
    "skipIfTemplate",
    "skipUnlessDom0",
    "skipUnlessEnv",
    "skipUnlessGit",
]
