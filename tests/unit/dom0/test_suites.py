"""Which suites of a core words mean; what a core finds of ours."""

import importlib.metadata
import logging
import subprocess
import sys

import pytest

from qubes_itests.dom0 import modules

#: What a core under test imports, in a process of its own: the stand-ins stay.
PROGRAM = """\
import importlib.metadata, libvirt, libvirtaio
real = libvirt.__file__
from qubes_itests.dom0 import modules
modules.install()
import libvirt as ours, xen.lowlevel.xc, xen.lowlevel.xs
assert ours.__file__ != real, real
with modules.uncovered():
    import libvirt as within
    assert within.__file__ == real
import libvirt as after
assert after is ours
found = importlib.metadata.entry_points(group="qubes.storage")
assert not [entry for entry in found if entry.module.startswith("qubes_storage")]
"""


def test_the_stand_ins_cover_the_real_modules_and_our_drivers():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert list(importlib.metadata.entry_points(group="qubes.storage"))


def test_a_record_of_the_log_keeps_no_object():
    class VM:
        def __str__(self):
            return "work"

    try:
        raise ValueError("why")  # noqa: TRY301
    except ValueError:
        made = modules._record(
            "n", logging.ERROR, "f", 1, "VM %s", (VM(),), sys.exc_info()
        )
    assert (made.getMessage(), made.args, made.exc_info) == ("VM work", None, None)
    assert made.exc_text.endswith("ValueError: why")


def test_a_log_whose_arguments_do_not_fit_raises_nothing():
    made = modules._record("n", logging.ERROR, "f", 1, "VM %d", ("work",), None)
    assert made.getMessage() == "VM %d ('work',)"


def test_what_is_missing_is_named():
    with pytest.raises(AttributeError, match=r"no libvirt\.virDomain\.migrate"):
        modules.missing("libvirt.virDomain.migrate", "migrate")
