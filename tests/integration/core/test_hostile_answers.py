"""Guests that answer the core's own calls for ever, or never.

Each call ends by its deadline, says what it waited for, and costs no memory.
"""

import contextlib
import logging
import re
import time
from pathlib import Path

import pytest
from conditions import deadlines

from qubes_itests.admin.dispatch import Dispatcher
from qubes_itests.admin.methods import METHODS
from qubes_itests.admin.protocol import Request
from qubes_itests.compat_core2 import VMWrapper
from qubes_itests.core.vm import life
from qubes_itests.exc import DeadlineError
from qubes_itests.guest.exc import GuestError
from qubes_itests.testcase import case

MIB = 1024**2
#: Seconds that the guest has to answer, and never needs.
PATIENCE = 300

FLOODS = {
    "output": "exec cat /dev/zero",
    "error output": "exec cat /dev/zero >&2",
    "both": "cat /dev/zero >&2 & exec cat /dev/zero",
    "both, and signals do not end it": (
        "trap '' PIPE TERM HUP; while :; do cat /dev/zero & cat /dev/zero >&2; done"
    ),
}
SILENCE = "trap '' TERM HUP; echo one moment >&2; sleep 9000"


@pytest.fixture
def vm(make_vm, run):
    vm = make_vm("work")
    run(vm.start())
    vm.qrexec_timeout = PATIENCE
    return vm


@pytest.fixture
def offer(vm, sh):
    """Have the guest offer a service that does not mean well."""

    def offer(service, script):
        path = f"/etc/qubes-rpc/{service}"
        sh(vm, f"cat > {path} <<'END'\n#!/bin/sh\n{script}\nEND\nchmod 755 {path}")

    return offer


@contextlib.contextmanager
def flat_memory():
    """Check that this process never takes 16 MiB more than before, however briefly."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    yield
    assert resident("VmHWM") - before < 16 * MIB


def resident(key):
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{key}:\s+([0-9]+) kB$", status, re.MULTILINE)[1]) * 1024


def resize(vm):
    """Return a call of the Admin API."""
    size = vm.volumes["private"].size + 16 * MIB
    method = "admin.vm.volume.Resize"
    request = Request(method, "private", "dom0", vm.name, str(size).encode())
    return Dispatcher(vm.app, METHODS).answer(request)


@pytest.mark.parametrize("kind", FLOODS)
def test_a_resize_service_that_writes_for_ever_is_cut_off(vm, run, sh, offer, kind):
    offer("qubes.ResizeDisk", FLOODS[kind])
    with flat_memory():
        reply = run(resize(vm))
    assert re.match(rb"2\0QubesException\0", reply)
    assert b"'qubes.ResizeDisk' wrote more than 65536 bytes" in reply
    assert sh(vm, "echo on") == "on"


def test_a_resize_service_that_never_answers_is_given_up(vm, run, sh, offer):
    """The disk has grown, and that is kept; the error names what did not come."""
    offer("qubes.ResizeDisk", SILENCE)
    for seconds in deadlines(2):
        vm.qrexec_timeout = int(seconds)
        before = vm.volumes["private"].size
        began = time.monotonic()
        reply = run(resize(vm))
        assert seconds <= time.monotonic() - began < seconds + PATIENCE
        if b"one moment" in reply:
            break
    assert (
        f"no answer of VM work, which was to enlarge the filesystem of its volume"
        f" private, within {seconds:g} s; last seen:\n| one moment"
    ).encode() in reply
    assert vm.volumes["private"].size == before + 16 * MIB
    left = "ps -o args | grep -c '[s]leep 9000' || true"
    assert sh(vm, left) == "0", "it was killed, and so was what it had begun"


def test_a_guest_that_floods_is_suspended_all_the_same(
    vm, run, offer, caplog, monkeypatch
):
    """As one that has no such service; and it wakes up again."""
    monkeypatch.setattr(life, "_SERVICE_TIMEOUT", PATIENCE)
    for service in ("qubes.SuspendPreAll", "qubes.SuspendPostAll"):
        offer(service, FLOODS["both"])
    caplog.set_level(logging.INFO, "qubes.vm")
    with flat_memory():
        run(vm.suspend())
        assert vm.get_power_state() == "Suspended"
        run(vm.resume())
    assert vm.get_power_state() == "Running"
    assert caplog.text.count("wrote more than 65536 bytes") == 2


@pytest.mark.parametrize(
    ("script", "patience", "error"),
    [(FLOODS["output"], PATIENCE, GuestError), (SILENCE, 2, DeadlineError)],
)
def test_a_session_that_is_no_session(  # noqa: PLR0917 - fixtures
    vm, run, offer, monkeypatch, script, patience, error
):
    monkeypatch.setattr(case, "_SESSION_TIMEOUT", patience)
    offer("qubes.WaitForSession", script)
    with flat_memory(), pytest.raises(error):
        run(case.SystemTestCase.wait_for_session(None, vm))


def test_output_that_a_test_does_not_want_is_kept_nowhere(vm, testbed):
    """`run(wait=True)` returns a status alone: a flood is read, and dropped."""
    with testbed.portal.as_current_loop() as loop:
        wrapper = VMWrapper(vm, loop)
        with flat_memory():
            assert wrapper.run("timeout 2 cat /dev/zero; exit 7", wait=True) == 7
            script = "timeout 2 cat /dev/zero; exit 8"
            assert wrapper.run_service("qubes.VMShell", input=script) == 8
