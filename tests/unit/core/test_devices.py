"""The devices of VMs: assignments, events, vetoes, and what block devices are."""

import asyncio
import errno
from types import SimpleNamespace

import pytest
from cancelling import cancelled_everywhere

from qubes_itests.core import exc
from qubes_itests.core.device.assignment import AssignmentMode, DeviceAssignment
from qubes_itests.core.device.collections import DeviceManager
from qubes_itests.core.device.host_block import expose, exposed, withdraw
from qubes_itests.core.device.info import UnknownDevice
from qubes_itests.core.device.port import Port, VirtualDevice
from qubes_itests.core.events import Emitter
from qubes_itests.core.vm.life import PowerState
from qubes_itests.guest.link import block_export
from qubes_itests.hypervisor.exc import HypervisorError

MIB = 1024**2

pytestmark = pytest.mark.asyncio


class Domain:
    """Takes disks, as long as nobody says otherwise."""

    def __init__(self):
        self.disks = {}
        self.refusal = None
        self.asked = asyncio.Event()
        self.pace = asyncio.Event()
        self.pace.set()

    async def attach_disk(self, disk):
        self.asked.set()
        await self.pace.wait()
        await asyncio.sleep(0)
        if self.refusal:
            raise HypervisorError("work", "attach", self.refusal)
        self.disks[disk.name] = disk

    async def detach_disk(self, name):
        await asyncio.sleep(0)
        if self.refusal:
            raise HypervisorError("work", "detach", self.refusal)
        del self.disks[name]


def _running(app, template, name):
    vm = app.add_new_vm("AppVM", name=name, label="red", template=template)
    vm.life.domain, vm.life.state = Domain(), PowerState.RUNNING
    return vm


@pytest.fixture
def work(app, template):
    return _running(app, template, "work")


@pytest.fixture
def other(app, template):
    return _running(app, template, "other")


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "data.img"
    path.write_bytes(bytes(MIB))
    return path


@pytest.fixture
def events(work):
    seen = []

    def heard(_vm, event, **kwargs):
        if "list" not in event and "get" not in event:
            seen.append((event, kwargs))

    work.add_handler("device-*", heard)
    return seen


def block(vm):
    return vm.devices["block"]


def attached(vm):
    return {a.port_id: a.options for a in block(vm).get_attached_devices()}


async def test_an_exposed_image_is_a_device_of_dom0(app, image):
    heard = []
    dom0 = app.domains["dom0"]
    for event in ("device-added:block", "device-removed:block"):
        dom0.add_handler(event, lambda _, event, **kw: heard.append((event, [*kw])))
    device = await expose(app, image)
    assert list(block(dom0)) == [block(dom0)["data.img"]] == [device]
    assert (device.port_id, device.devclass, device.backend_domain) == (
        *("data.img", "block"),
        dom0,
    )
    assert device.path == image
    assert device.data == {"size": str(MIB), "mode": "w"}
    assert device.description == "Block_Storage: hosted by dom0 data.img"
    await withdraw(app, "data.img")
    assert list(exposed(app)) == []
    assert image.exists()
    assert heard == [
        ("device-added:block", ["device"]),
        ("device-removed:block", ["port"]),
    ]


async def test_what_cannot_be_exposed(app, image, tmp_path):
    for path, name in ((tmp_path, None), (tmp_path / "no", None), (image, "../x")):
        with pytest.raises(exc.QubesValueError):
            await expose(app, path, name)
    await expose(app, image)
    with pytest.raises(exc.QubesValueError, match=r"block device 'data\.img' already"):
        await expose(app, image)
    with pytest.raises(exc.QubesException, match="exposes no block device 'none'"):
        await withdraw(app, "none")


async def test_what_is_gone_or_no_image_is_no_device(app, image):
    """It can be withdrawn all the same."""
    await expose(app, image)
    folder = app.directory / "block"
    (folder / "folder").mkdir()
    (folder / "with space").write_bytes(b"")
    image.unlink()
    dom0 = app.domains["dom0"]
    assert list(block(dom0)) == []
    for name in ("data.img", "..", "folder", "with space"):
        if name == "data.img":
            assert isinstance(block(dom0)[name], UnknownDevice)
    await withdraw(app, "data.img")


async def test_a_bad_link_hides_one_device_and_no_other(app, image):
    """A link to itself, one to nowhere, and what is gone between two looks at it."""
    folder = app.directory / "block"
    await expose(app, image, "good")
    (folder / "loop").symlink_to("loop")
    (folder / "two").symlink_to("three")
    (folder / "three").symlink_to("two")
    (folder / "nowhere").symlink_to(folder / "none" / "at all")
    (folder / "long").symlink_to("x" * 300)
    (folder / "into-a-file").symlink_to(image / "below")
    await expose(app, image, "zz-good")
    assert [d.port_id for d in block(app.domains["dom0"])] == ["good", "zz-good"]
    for name in ("loop", "two", "nowhere", "long", "into-a-file"):
        assert isinstance(block(app.domains["dom0"])[name], UnknownDevice)
        await withdraw(app, name)


async def test_what_cannot_be_read_is_not_exposed_and_leaves_no_link(
    app, image, monkeypatch
):
    """A card reader without a card is a block device, and cannot be opened."""

    def refuse(_path, _status):
        raise OSError(errno.ENOMEDIUM, "No medium found")

    monkeypatch.setattr("qubes_itests.core.device.host_block._size", refuse)
    with pytest.raises(exc.QubesValueError, match="cannot be read"):
        await expose(app, image)
    assert list((app.directory / "block").iterdir()) == []


async def test_who_is_cancelled_while_attaching_leaves_disk_and_list_alike(
    app, work, image
):
    device = await expose(app, image)
    assignment = DeviceAssignment(device)

    async def check():
        names = {options["frontend-dev"] for options in attached(work).values()}
        assert names == set(work.domain.disks)
        if names:
            await block(work).detach(assignment)

    async def attach_and_detach():
        await block(work).attach(assignment)
        await block(work).detach(assignment)

    assert await cancelled_everywhere(attach_and_detach, check) >= 6
    assert attached(work) == work.domain.disks == {}


async def test_attaching_and_detaching_fire_their_events_in_order(
    app, work, image, events
):
    """The handler of the attached device gets all options."""
    device = await expose(app, image)
    assignment = DeviceAssignment(device, options={"read-only": "on"})
    await block(work).attach(assignment)
    assert work.domain.disks["xvdi"].path == image
    assert work.domain.disks["xvdi"].read_only
    options = {"read-only": "yes", "frontend-dev": "xvdi"}
    assert attached(work) == {"data.img": options}
    await block(work).detach(assignment)
    assert work.domain.disks == {}
    kwargs = {"device": device, "options": options}
    assert events == [
        ("device-pre-attach:block", kwargs),
        ("device-attach:block", kwargs),
        ("device-pre-detach:block", {"port": device.port}),
        ("device-detach:block", {"port": device.port}),
    ]


async def test_a_veto_leaves_all_as_it_was(app, work, image):
    assignment = DeviceAssignment(await expose(app, image), mode="auto-attach")

    def veto(*_, **__):
        raise PermissionError("no")

    for event in ("attach", "detach", "assign"):
        work.add_handler(f"device-pre-{event}:block", veto)
    for call in (block(work).attach, block(work).assign):
        with pytest.raises(PermissionError):
            await call(assignment)
    assert attached(work) == work.domain.disks == {}
    assert list(block(work).get_assigned_devices()) == []
    work.remove_handler("device-pre-attach:block", veto)
    await block(work).attach(assignment)
    with pytest.raises(PermissionError):
        await block(work).detach(assignment)
    assert set(attached(work)) == {"data.img"}


async def test_a_refusal_of_the_hypervisor_is_an_error_of_qubes(app, work, image):
    """Nothing is attached then, and neither device nor name is taken."""
    assignment = DeviceAssignment(await expose(app, image))
    work.domain.refusal = "out of slots"
    with pytest.raises(exc.QubesVMError, match=r"attached to VM work: .*out of slots"):
        await block(work).attach(assignment)
    assert attached(work) == {}
    work.domain.refusal = None
    await block(work).attach(assignment)
    work.domain.refusal = "busy"
    with pytest.raises(exc.QubesVMError, match=r"detached from VM work: .*busy"):
        await block(work).detach(assignment)
    assert set(attached(work)) == {"data.img"}


async def test_two_attachments_at_once_are_one(app, work, other, image):
    """Whichever VM is slow: the second is refused before the first has ended."""
    assignment = DeviceAssignment(await expose(app, image))
    work.domain.pace.clear()
    first = asyncio.create_task(block(work).attach(assignment))
    await work.domain.asked.wait()
    for vm in (work, other):
        with pytest.raises(exc.DeviceAlreadyAttached, match="attached to work already"):
            await block(vm).attach(assignment)
    work.domain.pace.set()
    await first
    assert (list(work.domain.disks), other.domain.disks) == (["xvdi"], {})


async def test_two_attachments_that_handlers_hold_up_are_one_too(app, work, image):
    """Both have found the device free when the first gets it."""
    assignment = DeviceAssignment(await expose(app, image))
    go = asyncio.Event()

    async def wait(*_, **__):
        await go.wait()

    work.add_handler("device-pre-attach:block", wait)
    both = asyncio.gather(
        *(block(work).attach(assignment) for _ in range(2)), return_exceptions=True
    )
    await asyncio.sleep(0)
    go.set()
    first, second = await both
    assert first is None
    assert isinstance(second, exc.DeviceAlreadyAttached)
    assert list(work.domain.disks) == ["xvdi"]


async def test_a_cancelled_attachment_is_undone(app, work, image):
    assignment = DeviceAssignment(await expose(app, image))
    work.domain.pace.clear()
    attaching = asyncio.create_task(block(work).attach(assignment))
    await work.domain.asked.wait()
    attaching.cancel()
    await asyncio.sleep(0)
    work.domain.pace.set()
    with pytest.raises(asyncio.CancelledError):
        await attaching
    assert attached(work) == work.domain.disks == {}


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"frontend-dev": "sda"}, "it takes xvda to xvdz"),
        ({"frontend-dev": "xvdaa"}, "it takes xvda to xvdz"),
        ({"frontend-dev": "xvda"}, "has a disk xvda already"),
        ({"read-only": "perhaps"}, "truth value"),
        ({"devtype": "floppy"}, "takes cdrom or disk, not 'floppy'"),
        ({"devtype": "cdrom", "read-only": "no"}, "a CD-ROM can be read only"),
        ({"colour": "red"}, "no option colour"),
    ],
)
async def test_options_that_cannot_be(app, work, image, options, error):
    assignment = DeviceAssignment(await expose(app, image), options=options)
    with pytest.raises(ValueError, match=error):
        await block(work).attach(assignment)
    assert attached(work) == {}


async def test_a_file_that_nobody_may_write_is_attached_read_only(app, work, image):
    image.chmod(0o444)
    device = await expose(app, image)
    with pytest.raises(exc.QubesValueError, match="can be read only"):
        await block(work).attach(DeviceAssignment(device, options={"read-only": "no"}))
    await block(work).attach(DeviceAssignment(device))
    assert work.domain.disks["xvdi"].read_only


async def test_a_cdrom_is_a_disk_that_is_read_only(app, work, image):
    """As ``qvm-start --cdrom`` asks for it."""
    device = await expose(app, image)
    for more in ({}, {"read-only": "True"}):
        options = {"devtype": "cdrom", **more}
        await block(work).attach(DeviceAssignment(device, options=options))
        assert work.domain.disks["xvdi"].read_only
        await block(work).detach(DeviceAssignment(device))


async def test_names_of_disks_run_out(app, work, image):
    for number in range(23):
        device = await expose(app, image, f"disk{number}")
        if number == 22:
            with pytest.raises(exc.QubesVMError, match="as many disks as there are"):
                await block(work).attach(DeviceAssignment(device))
        else:
            await block(work).attach(DeviceAssignment(device))
    assert len(work.domain.disks) == 22
    assert not {"xvda", "xvdb", "xvdc", "xvdd"} & set(work.domain.disks)


async def test_dom0_gets_no_devices(app, image):
    device = await expose(app, image)
    with pytest.raises(exc.QubesVMError, match="no domain"):
        await block(app.domains["dom0"]).attach(DeviceAssignment(device))
    with pytest.raises(exc.DeviceNotAssigned, match="not attached to VM dom0"):
        await app.domains["dom0"].fire_event_async(
            "device-pre-detach:block", pre_event=True, port=device.port
        )


async def test_assignments_and_their_events(app, work, events):
    card = VirtualDevice(Port(app.domains["dom0"], "00_01.0", "pci"))
    devices, options = work.devices["pci"], {"permissive": "yes"}
    assignment = DeviceAssignment(card, options=options, mode="required")
    await devices.assign(assignment)
    with pytest.raises(exc.DeviceAlreadyAssigned, match="assigned to VM work already"):
        await devices.assign(assignment)
    (known,) = devices.get_assigned_devices()
    assert (known.frontend_domain, known.options, known.required) == (
        *(work, options),
        True,
    )
    await devices.update_assignment(card, AssignmentMode.AUTO)
    await devices.update_assignment(card, "auto-attach")
    assert list(devices.get_assigned_devices(required_only=True)) == []
    assert [a.options for a in devices.get_assigned_devices()] == [options]
    await devices.unassign(assignment)
    with pytest.raises(exc.DeviceNotAssigned, match="not assigned to VM work"):
        await devices.unassign(assignment)
    with pytest.raises(exc.DeviceNotAssigned):
        await devices.update_assignment(card, AssignmentMode.AUTO)
    assert [event for event, _ in events] == [
        "device-pre-assign:pci",
        "device-assign:pci",
        "device-pre-assign:pci",
        "device-assignment-changed:pci",
        "device-unassign:pci",
    ]


async def test_assignments_that_handlers_hold_up(app, work):
    """One of two makes the assignment; none that is undone meanwhile comes back."""
    devices = work.devices["pci"]
    card = VirtualDevice(Port(app.domains["dom0"], "00_01.0", "pci"))
    go = asyncio.Event()

    async def wait(*_, **__):
        await go.wait()

    work.add_handler("device-pre-assign:pci", wait)
    both = asyncio.gather(
        *(
            devices.assign(DeviceAssignment(card, mode=m))
            for m in ("required", "auto-attach")
        ),
        return_exceptions=True,
    )
    await asyncio.sleep(0)
    go.set()
    first, second = await both
    assert first is None
    assert isinstance(second, exc.DeviceAlreadyAssigned)
    assert [a.required for a in devices.get_assigned_devices()] == [True]
    go.clear()
    change = asyncio.create_task(devices.update_assignment(card, "auto-attach"))
    await asyncio.sleep(0)
    await devices.unassign(card)
    go.set()
    with pytest.raises(exc.DeviceNotAssigned):
        await change
    assert list(devices.get_assigned_devices()) == []


async def test_assignments_that_cannot_be(app, work):
    card = VirtualDevice(Port(app.domains["dom0"], "00_01.0", "pci"))
    with pytest.raises(exc.QubesValueError, match="mode 'manual'"):
        await work.devices["pci"].assign(DeviceAssignment(card))
    with pytest.raises(exc.ProtocolError, match="is a pci device, not a block device"):
        await block(work).assign(DeviceAssignment(card, mode="required"))
    with pytest.raises(exc.QubesValueError, match="no class of devices"):
        work.devices["No Class"]
    await work.devices["pci"].assign(DeviceAssignment(card, mode="required"))
    with pytest.raises(exc.QubesValueError, match="cannot become 'manual'"):
        await work.devices["pci"].update_assignment(card, AssignmentMode.MANUAL)


async def test_what_a_vm_has_and_is_to_have(app, work, image):
    """An attached device has the mode of the assignment that it is covered by."""
    device = await expose(app, image)
    anything = VirtualDevice(Port(app.domains["dom0"], None, "block"))
    await block(work).assign(DeviceAssignment(anything, mode="auto-attach"))
    await block(work).attach(DeviceAssignment(device))
    both = list(block(work).get_dedicated_devices())
    assert both == [device, anything]
    assert [a.mode for a in both] == [AssignmentMode.AUTO] * 2
    assert [a.attached for a in both] == [True, True]


async def test_a_vm_whose_devices_are_assigned_is_not_removed(app, template, work):
    """It is named by whom; unassigned, it goes."""
    usb = app.add_new_vm("AppVM", name="sys-usb", label="red", template=template)
    stick = DeviceAssignment(VirtualDevice(Port(usb, "1-1", "usb")), mode="auto-attach")
    await work.devices["usb"].assign(stick)
    with pytest.raises(exc.QubesVMInUseError, match=r"used by work \(usb device"):
        del app.domains[usb]
    await work.devices["usb"].unassign(stick)
    del app.domains[usb]


async def test_an_assignment_to_ask_about_waits(app, work, image):
    """Nobody can be asked; by hand it can be attached."""
    port = VirtualDevice(Port(app.domains["dom0"], "data.img", "block"))
    assignment = DeviceAssignment(port, mode="ask-to-attach")
    await block(work).assign(assignment)
    await expose(app, image)
    assert attached(work) == {}
    await block(work).attach(assignment)
    assert set(attached(work)) == {"data.img"}


async def test_a_collection_of_what_is_no_vm():
    """Tests of extensions have emitters in place of VMs, which know no more."""

    class Backend(Emitter):
        name = "backend"

    subject = Backend()
    device = VirtualDevice(Port(subject, "sda", "block"), "disk")
    collection = DeviceManager(subject)["block"]
    await collection.assign(DeviceAssignment(device, mode="required"))
    assert [a.port_id for a in collection.get_assigned_devices()] == ["sda"]


def _told(vm, **devices):
    vm.life.device_entries = {
        f"/qubes-block-devices/{name}/{key}": value
        for name, said in devices.items()
        for key, value in said.items()
    }
    return {device.port_id: device for device in vm.devices["block"]}


async def test_what_a_guest_tells_of_its_devices(work):
    """The names that Qubes OS has for it, and the identity, also of a part."""
    sda = {"desc": "A_Stick (my_label)", "size": "4096", "mode": "r", "parent": ""}
    found = _told(work, sda=sda, sda1={"desc": "A_Stick ()", "parent": "sda"})
    whole, part = found["sda"], found["sda1"]
    assert (whole.serial, whole.name, whole.mode) == ("A Stick", "my label", "r")
    assert (whole.size, whole.device_node) == (4096, "/dev/sda")
    assert (whole.manufacturer, whole.parent_device) == ("hosted by work", None)
    assert (whole.device_id, part.device_id) == (":None", ":None:1")
    assert part.parent_device == whole
    assert part.manufacturer == "sub-device of work:sda"
    assert whole.subdevices == [part]
    work.life.state = PowerState.HALTED
    assert list(work.devices["block"]) == []


async def test_a_guest_may_tell_what_it_likes_of_its_devices(work):
    """No control characters come of it, no bad names, and no recursion."""
    liar = {"desc": "\x1b[0m\N{BULLET}* (", "size": "-1", "mode": "x", "parent": "b"}
    found = _told(
        work,
        **{"a": liar, "b": {"parent": "a"}, "..": liar, "x" * 13: liar},
        usb={"parent": "4-4.1:1.0"},
        gone={"parent": "none"},
    )
    assert sorted(found) == ["a", "b", "gone", "usb"]
    assert found["a"].serial.isprintable()
    assert (found["a"].size, found["a"].mode) == (0, "w")
    assert found["a"].parent_device == found["b"]
    assert found["b"].parent_device == found["a"]
    assert found["usb"].parent_device is None
    assert isinstance(found["gone"].parent_device, UnknownDevice)
    assert b"\x1b" not in found["a"].serialize()


async def test_what_a_guest_tells_of_its_devices_is_bounded(work):
    """In number, and in what is a part of what: each change costs the host the same."""
    notes = []
    agent = SimpleNamespace(on_db_change=notes.append)
    work.life._follow_devices(agent)
    for number in range(1000):
        path = f"/qubes-block-devices/a{number}/parent"
        notes[0](path, f"a{number + 1}")
    assert len(list(block(work))) == 129
    assert max(d.device_id.count(":") for d in block(work)) == 9
    work.life.halted_by_failure()
    work.life.state = PowerState.TRANSIENT
    assert list(block(work)) == []  # of the run before


@pytest.fixture
def back(app, template):
    """Return a VM that tells of a device, which is served by nobody."""
    back = _running(app, template, "back")
    back.life.agent = SimpleNamespace(close=asyncio.Event().wait)
    return back


def _change(vm, *names):
    _told(vm, **{name: {"size": "4096"} for name in names})
    vm.note_qdb_change("/qubes-block-devices")


async def _until(condition):
    async with asyncio.timeout(300):
        while not condition():  # noqa: ASYNC110 - what has no event
            await asyncio.sleep(0)


async def _wait_for(vm, backend, *names, mode="auto-attach"):
    for name in names:
        port = Port(backend, name, "block")
        assignment = DeviceAssignment(VirtualDevice(port), mode=mode)
        await block(vm).assign(assignment)


async def test_a_device_that_goes_while_it_is_attached_is_detached(work, back):
    await _wait_for(work, back, "loop0")
    domain = work.life.domain
    domain.pace.clear()
    _change(back, "loop0")
    await domain.asked.wait()
    _change(back)
    for _ in range(20):
        await asyncio.sleep(0)
    domain.pace.set()
    await _until(lambda: not attached(work))
    assert domain.disks == {}


async def test_devices_are_told_of_after_one_that_cannot_be_attached(work, back):
    await _wait_for(work, back, "loop0", mode="required")
    work.life.domain.refusal = "no"
    added = []
    back.add_handler(
        "device-added:block", lambda _vm, _event, device: added.append(device.port_id)
    )
    _change(back, "loop0", "loop1")
    await _until(lambda: "loop1" in added)


async def test_a_device_can_be_detached_whose_guest_answers_no_more(
    work, back, monkeypatch
):
    """QEMU waits for the answer to what it has asked until nobody serves."""
    _change(back, "loop0")
    await block(work).attach(DeviceAssignment(block(back)["loop0"]))
    domain, detach = work.life.domain, work.life.domain.detach_disk
    (disk,) = domain.disks.values()

    async def detach_disk(name):
        await _until(lambda: not disk.path.exists())
        await detach(name)

    monkeypatch.setattr(domain, "detach_disk", detach_disk)
    monkeypatch.setattr(block_export, "_ANSWER", 0.01)
    await block(work).detach(Port(back, "loop0", "block"))
    assert (attached(work), domain.disks) == ({}, {})


async def test_a_vm_cannot_have_its_own_device(back):
    _change(back, "loop0")
    with pytest.raises(exc.QubesValueError, match="cannot have its own device back:"):
        await block(back).attach(DeviceAssignment(block(back)["loop0"]))
    assert attached(back) == {}
