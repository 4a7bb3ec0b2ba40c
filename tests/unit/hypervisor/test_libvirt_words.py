"""libvirt's errors and events in the contract's words."""

from __future__ import annotations

import libvirt
import pytest

from qubes_itests.hypervisor.connection import Connection, translate_error
from qubes_itests.hypervisor.contract import DomainState, LifecycleEvent
from qubes_itests.hypervisor.domain import is_panic, lifecycle_event, lifecycle_state
from qubes_itests.hypervisor.exc import (
    HypervisorError,
    StateError,
)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (libvirt.VIR_ERR_NO_DOMAIN, StateError),
        (libvirt.VIR_ERR_OPERATION_INVALID, StateError),
        (libvirt.VIR_ERR_DEVICE_MISSING, HypervisorError),
        (libvirt.VIR_ERR_NO_SUPPORT, HypervisorError),
        (libvirt.VIR_ERR_INTERNAL_ERROR, HypervisorError),
    ],
)
def test_errors(code, kind):
    error = libvirt.libvirtError("call failed")
    error.err = (code, 0, "the words of libvirt", 0, "", None, None, 0, 0)
    translated = translate_error(error, "work", "start")
    assert type(translated) is kind
    assert (translated.domain, translated.action) == ("work", "start")
    assert "the words of libvirt" in str(translated)
    assert f"error {code}" in str(translated)


@pytest.mark.parametrize(
    "words",
    [
        "internal error: End of file from qemu monitor (vm='work')",
        "Unable to read from monitor: Connection reset by peer",
        "Unable to write to monitor: Broken pipe",
        "operation failed: domain is no longer running",
    ],
)
def test_an_end_during_a_call_is_one_of_the_state(words):
    error = libvirt.libvirtError("call failed")
    error.err = (libvirt.VIR_ERR_INTERNAL_ERROR, 0, words, 0, "", None, None, 0, 0)
    assert type(translate_error(error, "work", "pause")) is StateError


@pytest.mark.parametrize(
    ("event", "detail", "expected"),
    [
        (libvirt.VIR_DOMAIN_EVENT_STARTED, 0, LifecycleEvent.STARTED),
        (libvirt.VIR_DOMAIN_EVENT_SUSPENDED, 0, LifecycleEvent.PAUSED),
        (libvirt.VIR_DOMAIN_EVENT_RESUMED, 0, LifecycleEvent.RESUMED),
        (
            libvirt.VIR_DOMAIN_EVENT_STOPPED,
            libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN,
            LifecycleEvent.STOPPED,
        ),
        (
            libvirt.VIR_DOMAIN_EVENT_STOPPED,
            libvirt.VIR_DOMAIN_EVENT_STOPPED_FAILED,
            LifecycleEvent.CRASHED,
        ),
        (
            libvirt.VIR_DOMAIN_EVENT_STOPPED,
            libvirt.VIR_DOMAIN_EVENT_STOPPED_CRASHED,
            LifecycleEvent.CRASHED,
        ),
        (libvirt.VIR_DOMAIN_EVENT_DEFINED, 0, None),
    ],
)
def test_events(event, detail, expected):
    assert lifecycle_event(event, detail) is expected


def test_states():
    assert lifecycle_state(libvirt.VIR_DOMAIN_BLOCKED) is DomainState.RUNNING
    assert lifecycle_state(libvirt.VIR_DOMAIN_SHUTOFF) is DomainState.HALTED


@pytest.mark.asyncio
async def test_a_connection_that_is_refused(capfd):
    """The error has libvirt's words, and libvirt prints nothing itself."""
    with pytest.raises(HypervisorError, match=r"cannot connect to .*: .+"):
        await Connection.open("nosuchdriver:///")
    assert capfd.readouterr() == ("", "")


def test_a_panic_is_told_from_a_qemu_that_died():
    stopped = libvirt.VIR_DOMAIN_EVENT_STOPPED
    assert is_panic(libvirt.VIR_DOMAIN_EVENT_CRASHED, 0)
    assert is_panic(stopped, libvirt.VIR_DOMAIN_EVENT_STOPPED_CRASHED)
    assert not is_panic(stopped, libvirt.VIR_DOMAIN_EVENT_STOPPED_FAILED)
    assert not is_panic(stopped, libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN)
