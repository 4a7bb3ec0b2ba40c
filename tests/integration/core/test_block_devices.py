"""Block devices of dom0 as disks of real guests: live, at each start, gone after."""

import subprocess
import threading

import pytest

from qubes_itests.core import exc
from qubes_itests.core.device.assignment import AssignmentMode, DeviceAssignment
from qubes_itests.core.device.host_block import expose, withdraw
from qubes_itests.core.device.port import Port
from qubes_itests.exc import DeadlineError

MIB = 1024**2


@pytest.fixture
def vm(make_vm):
    return make_vm("work")


@pytest.fixture
def image(app):
    """Make an image of the host that begins with a name."""

    def image(name, size=4 * MIB):
        path = app.directory / name
        path.write_bytes(name.encode().ljust(size, b"\0"))
        return path

    return image


@pytest.fixture
def exposed(app, run, image):
    """Expose an image of the host, and return what attaches or assigns it."""

    def exposed(name, mode="manual", **options):
        device = run(expose(app, image(name)))
        return DeviceAssignment(device, options=options, mode=mode)

    return exposed


def attach(run, vm, assignment):
    run(vm.devices["block"].attach(assignment))


def attached(vm):
    return {
        a.port_id: a.options["frontend-dev"]
        for a in vm.devices["block"].get_attached_devices()
    }


class Disks:
    """The disks of a guest, as its kernel has them."""

    def __init__(self, sh):
        self.sh = sh

    def begins(self, vm, name):
        """Return how the one of that name begins, which is there when it is said so."""
        return self.sh(vm, f"test -b /dev/{name} && head -c 4 /dev/{name}")

    def is_gone(self, vm, name):
        """Tell whether there is none of that name, at once."""
        return self.sh(vm, f"ls -d /dev/{name} 2>/dev/null || echo gone") == "gone"


@pytest.fixture
def disks(sh):
    return Disks(sh)


@pytest.fixture
def events(vm):
    seen = []
    vm.add_handler("device-*", lambda _vm, event, **_: seen.append(event))
    return seen


def changes(events):
    """Return the events that change something, without those that only ask."""
    return [e for e in events if "list" not in e and "get" not in e]


def test_a_device_comes_is_written_and_goes(vm, run, exposed, disks, events):
    """And comes back with what the guest wrote, under the same name."""
    data, sh = exposed("data"), disks.sh
    run(vm.start())
    attach(run, vm, data)
    assert disks.begins(vm, "xvdi") == "data"
    assert int(sh(vm, "blockdev --getsize64 /dev/xvdi")) == 4 * MIB
    assert attached(vm) == {"data": "xvdi"}
    assert data.device.attachment is vm
    sh(vm, "printf DATA | dd of=/dev/xvdi conv=notrunc,fsync")
    assert data.device.path.read_bytes()[:4] == b"DATA"
    run(vm.devices["block"].detach(data.port))
    assert disks.is_gone(vm, "xvdi")
    assert attached(vm) == {}
    assert data.device.attachment is None
    attach(run, vm, data)
    assert disks.begins(vm, "xvdi") == "DATA"
    change = ["device-pre-attach:block", "device-attach:block"]
    back = ["device-pre-detach:block", "device-detach:block"]
    assert changes(events) == [*change, *back, *change]
    run(vm.shutdown(wait=True))
    assert attached(vm) == {}
    assert changes(events)[-1] == "device-detach:block"
    run(vm.start())
    assert disks.is_gone(vm, "xvdi")


def test_several_devices_have_names_of_their_own(vm, run, sh, exposed, disks):
    """Asked for, or the next; the one that is read-only is so for the guest."""
    run(vm.start())
    attach(run, vm, exposed("first"))
    attach(run, vm, exposed("second", **{"frontend-dev": "xvdk", "read-only": "yes"}))
    attach(run, vm, exposed("third"))
    assert attached(vm) == {"first": "xvdi", "second": "xvdk", "third": "xvdj"}
    assert disks.begins(vm, "xvdk") == "seco"
    assert disks.begins(vm, "xvdj") == "thir"
    assert sh(vm, "cat /sys/block/$(basename $(readlink -f /dev/xvdk))/ro") == "1"
    with pytest.raises(subprocess.CalledProcessError):
        sh(vm, "printf x | dd of=/dev/xvdk conv=notrunc,fsync")


def test_what_cannot_be_attached(app, vm, run, exposed, make_vm):
    """The error names the reason, and nothing has changed."""
    data, other = exposed("data"), exposed("other")
    with pytest.raises(exc.QubesVMNotRunningError, match="start it first, or assign"):
        attach(run, vm, data)
    run(vm.start())
    second = make_vm("second")
    run(second.start())
    attach(run, vm, data)
    for who in (vm, second):
        with pytest.raises(exc.DeviceAlreadyAttached, match="attached to work already"):
            attach(run, who, data)
    taken = other.clone(options={"frontend-dev": "xvdi"})
    with pytest.raises(exc.QubesValueError, match="work has a disk xvdi already"):
        attach(run, vm, taken)
    attach(run, second, taken)
    nothing = DeviceAssignment(
        app.domains["dom0"].devices["block"]["nothing"], options={}
    )
    with pytest.raises(exc.UnrecognizedDevice, match="dom0 exposes data, other"):
        attach(run, vm, nothing)
    with pytest.raises(exc.DeviceNotAssigned, match="other is not attached to VM work"):
        run(vm.devices["block"].detach(other.port))
    assert (attached(vm), attached(second)) == ({"data": "xvdi"}, {"other": "xvdi"})


def test_an_image_that_another_vm_uses_is_refused_by_the_hypervisor(
    app, vm, run, make_vm
):
    """It holds the image of a volume; the error is one of Qubes, nothing changed."""
    second = make_vm("second")
    run(vm.start())
    run(second.start())
    device = run(expose(app, second.volumes["private"].path, "private"))
    with pytest.raises(exc.QubesVMError, match="cannot be attached to VM work"):
        attach(run, vm, DeviceAssignment(device))
    assert attached(vm) == {}
    run(second.shutdown(wait=True))


@pytest.mark.parametrize("mode", ["auto-attach", "required"])
def test_what_is_assigned_is_there_at_each_start(vm, run, exposed, disks, mode):
    """With the options of the assignment; and not before the next start."""
    data = exposed("data", mode, **{"frontend-dev": "xvdm"})
    run(vm.start())
    run(vm.devices["block"].assign(data))
    assert attached(vm) == {}
    for _ in range(2):
        run(vm.shutdown(wait=True))
        run(vm.start())
        assert attached(vm) == {"data": "xvdm"}
        assert disks.begins(vm, "xvdm") == "data"
    if mode == "required":
        with pytest.raises(exc.QubesVMNotHaltedError, match="required by VM work"):
            run(vm.devices["block"].detach(data.port))
        run(vm.devices["block"].update_assignment(data, AssignmentMode.AUTO))
    run(vm.devices["block"].detach(data.port))
    run(vm.devices["block"].unassign(data))
    run(vm.shutdown(wait=True))
    run(vm.start())
    assert attached(vm) == {}


def test_a_vm_starts_without_what_it_does_not_require(app, vm, run, disks, image):
    """It gets it as soon as it is there, and loses it when it is withdrawn."""
    port = Port(app.domains["dom0"], "late", "block")
    late = DeviceAssignment(port.backend_domain.devices["block"]["late"])
    anything = late.clone(device=type(late.virtual_device)(port), mode="auto-attach")
    run(vm.devices["block"].assign(anything))
    run(vm.start())
    assert attached(vm) == {}
    run(expose(app, image("late")))
    assert attached(vm) == {"late": "xvdi"}
    assert disks.begins(vm, "xvdi") == "late"
    run(withdraw(app, "late"))
    assert attached(vm) == {}
    assert list(app.domains["dom0"].devices["block"]) == []


def test_a_vm_does_not_start_without_what_it_requires(vm, run, exposed, make_vm):
    """Neither when it is gone, nor when another VM has it; then it starts."""
    data = exposed("data", "required")
    run(vm.devices["block"].assign(data))
    second = make_vm("second")
    run(second.start())
    attach(run, second, data)
    with pytest.raises(exc.QubesException, match="data, which is attached to second"):
        run(vm.start())
    assert vm.is_halted()
    run(second.kill())
    assert data.device.attachment is None
    run(vm.start())
    assert attached(vm) == {"data": "xvdi"}


def test_attachments_end_with_a_kill(vm, run, exposed, events):
    data = exposed("data")
    run(vm.start())
    attach(run, vm, data)
    run(vm.kill())
    assert data.device.attachment is None
    assert changes(events)[-1] == "device-detach:block"


def test_a_disk_is_there_when_it_is_said_so(vm, run, sh, exposed):
    """Again and again: one that comes late makes a plain file of what is written."""
    run(vm.start())
    assignment = exposed("first")
    for _ in range(8):
        attach(run, vm, assignment)
        sh(vm, "echo written >/dev/xvdi", user="root")
        assert sh(vm, "head -n 1 /dev/xvdi; test -f /dev/xvdi || echo disk") == (
            "written\ndisk"
        )
        run(vm.devices["block"].detach(assignment.port))
        assert sh(vm, "ls /dev/xvdi 2>/dev/null || echo gone") == "gone"


@pytest.fixture
def tell(testbed):
    """Have a VM say what its guest would say of a device; the device itself is real."""

    def tell(vm, name, **said):
        def say():
            for key, value in said.items():
                path = f"/qubes-block-devices/{name}/{key}"
                if value is None:
                    vm.life.device_entries.pop(path)
                else:
                    vm.life.device_entries[path] = value
            vm.note_qdb_change("/qubes-block-devices")

        testbed.portal.call(say)

    return tell


def test_a_device_of_another_vm(vm, run, exposed, disks, make_vm, tell, events):  # noqa: PLR0917
    """It is written to there; it goes when it is told of no more, or its VM ends."""
    back, data = make_vm("back"), exposed("data")
    seen, detached = [], threading.Event()
    vm.add_handler("device-detach:block", lambda *_args, **_kwargs: detached.set())
    back.add_handler(
        "device-added:block",
        lambda _vm, _event, device: seen.append(("added", device.port_id)),
    )
    back.add_handler(
        "device-removed:block",
        lambda _vm, _event, port: seen.append(("removed", port.port_id)),
    )
    run(back.start())
    run(vm.start())
    attach(run, back, data)
    tell(back, "xvdi", desc="a_model (label)", size="4194304", mode="w")
    (device,) = back.devices["block"].get_exposed_devices()
    assert (device.serial, device.name, device.size) == ("a model", "label", 4 * MIB)
    attach(run, vm, DeviceAssignment(device))
    assert (device.attachment, attached(vm)) == (vm, {"xvdi": "xvdi"})
    assert disks.begins(vm, "xvdi") == "data"
    disks.sh(vm, "printf DATA | dd of=/dev/xvdi conv=notrunc,fsync")
    assert data.device.path.read_bytes()[:4] == b"DATA"
    tell(back, "xvdi", desc=None, size=None, mode=None)
    assert detached.wait(300)
    assert (attached(vm), disks.is_gone(vm, "xvdi")) == ({}, True)
    tell(back, "xvdi", desc="a_model (label)", mode="r")
    (device,) = back.devices["block"].get_exposed_devices()
    with pytest.raises(exc.QubesValueError, match="back:xvdi can be read only"):
        attach(run, vm, DeviceAssignment(device, options={"read-only": "no"}))
    attach(run, vm, DeviceAssignment(device))
    assert disks.begins(vm, "xvdi") == "DATA"
    run(back.kill())
    assert (attached(vm), device.attachment) == ({}, None)
    assert disks.is_gone(vm, "xvdi")
    assert changes(events)[-1] == "device-detach:block"
    assert list(back.devices["block"].get_exposed_devices()) == []
    assert seen == 2 * [("added", "xvdi"), ("removed", "xvdi")]


def test_a_guest_that_sees_no_disk_has_none_attached(vm, run, exposed, monkeypatch):
    run(vm.start())
    assignment = exposed("first")

    async def late(name, state, *, timeout):
        raise DeadlineError(f"disk {name} to be {state}", timeout)

    monkeypatch.setattr(vm.agent, "wait_for_disk", late)
    with pytest.raises(exc.QubesVMError, match="disk xvdi to be there"):
        attach(run, vm, assignment)
    assert attached(vm) == {}
    monkeypatch.undo()
    attach(run, vm, assignment)
    assert attached(vm) == {"first": "xvdi"}
