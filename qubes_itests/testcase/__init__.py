"""The stable, synchronous test interface of Qubes OS.

Plugins import it as ``qubes.tests.extra``.  Test code has its own thread and may
block; the VMs live on in the event loop's thread.
"""

from __future__ import annotations

from qubes_itests.compat_core2 import ProcessWrapper, VMWrapper
from qubes_itests.testcase.case import (
    CLSVMPREFIX,
    VMPREFIX,
    ExtraTestCase,
    QubesTestCase,
    SystemTestCase,
)
from qubes_itests.testcase.emitter import TestEmitter
from qubes_itests.testcase.leaks import LeakError
from qubes_itests.testcase.suites import (
    create_testcases_for_templates,
    expectedFailureIfTemplate,
    in_dom0,
    list_templates,
    maybe_create_testcases_on_import,
    skipIfTemplate,
    skipUnlessDom0,
    skipUnlessEnv,
    skipUnlessGit,
    substitute_entry_points,
    wait_on_fail,
)

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
    "substitute_entry_points",
    "wait_on_fail",
]
