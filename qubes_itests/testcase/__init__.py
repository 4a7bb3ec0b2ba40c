"""The stable, synchronous test interface of Qubes OS.

Plugins import it as ``qubes.tests.extra``.  Test code runs in a thread of its own and
may block; the VMs live on in the event loop's thread.
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
from qubes_itests.testcase.entry_points import substitute_entry_points
from qubes_itests.testcase.exc import LeakError
from qubes_itests.testcase.pausing import wait_on_fail
from qubes_itests.testcase.templates import (
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
