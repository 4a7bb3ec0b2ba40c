"""What extensions do when devices come, go, or change hands."""

import asyncio
import unittest.mock
from collections import defaultdict

import pytest

from qubes_itests.core.device import changes
from qubes_itests.core.device.assignment import AssignmentMode, DeviceAssignment
from qubes_itests.core.device.info import DeviceInfo
from qubes_itests.core.device.port import Port, VirtualDevice
from qubes_itests.core.exc import QubesVMNotFoundError

pytestmark = pytest.mark.asyncio


class KeyDevice(DeviceInfo):
    """Of the class `key`; it says the same of itself on each port."""

    @property
    def device_id(self):
        return "a-key"


class Devices:
    def __init__(self, vm):
        self.vm = vm
        self.ports = []
        self.assigned = []

    def __getitem__(self, port_id):
        return KeyDevice(Port(self.vm, port_id, "key"))

    def __iter__(self):
        return iter([self[port] for port in self.ports])

    def get_assigned_devices(self):
        return iter(self.assigned)


class Domains(dict):
    def __iter__(self):
        return iter(self.values())

    def __contains__(self, name):
        return name in self.keys()

    def __missing__(self, name):
        raise QubesVMNotFoundError(name)


class VM:
    klass = "AppVM"

    def __init__(self, app, name):
        self.app = app
        self.name = name
        self.running = True
        self.events = []
        self.devices = {"key": Devices(self)}
        app.domains[name] = self

    def is_running(self):
        return self.running

    def fire_event(self, event, **keywords):
        (about,) = {k: v for k, v in keywords.items() if k != "options"}.values() or [0]
        self.events.append((event, str(getattr(about, "port", about) or "")))

    async def fire_event_async(self, event, **keywords):
        self.fire_event(event, **keywords)


class Keys:
    """An extension of devices, as far as the functions look at it."""

    def __init__(self):
        self.devices_cache = defaultdict(dict)
        self.given = []

    def ensure_detach(self, vm, port):
        self.given.append(("gone from", vm.name, str(port)))

    async def attach_and_notify(self, vm, assignment):
        self.given.append((vm.name, str(assignment), assignment.mode))


class App:
    def __init__(self):
        self.domains = Domains()


@pytest.fixture
def vms():
    app = App()
    return VM(app, "sys-key"), VM(app, "work"), VM(app, "other")


@pytest.fixture
def keys():
    return Keys()


def assign(vm, port, device_id="*", mode="auto-attach"):
    device = VirtualDevice(port, device_id)
    vm.devices["key"].assigned.append(DeviceAssignment(device, mode=mode))


async def change(keys, backend, now, *, path="/keys"):
    changes.device_list_change(keys, now, backend, path, KeyDevice)
    await asyncio.gather(*changes._tasks)


async def test_what_changes_is_told_to_those_it_concerns(vms, keys):
    backend, work, other = vms
    keys.devices_cache["sys-key"] = {"1": None, "2": work, "3": work, "4": None}
    await change(keys, backend, {"1": work, "2": None, "3": other, "5": None})
    assert sorted(backend.events) == [
        ("device-added:key", "sys-key:5"),
        ("device-list-change:key", ""),
        ("device-removed:key", "sys-key:4"),
    ]
    assert sorted(work.events) == [
        ("device-attach:key", "sys-key:1"),
        ("device-detach:key", "sys-key:2"),
        ("device-detach:key", "sys-key:3"),
    ]
    assert other.events == [("device-attach:key", "sys-key:3")]
    assert keys.devices_cache["sys-key"] == {
        "1": work,
        "2": None,
        "3": other,
        "5": None,
    }
    assert sorted(keys.given) == [
        ("gone from", "work", "sys-key:2"),
        ("gone from", "work", "sys-key:3"),
    ]
    before = list(backend.events), list(work.events)
    await change(keys, backend, dict(keys.devices_cache["sys-key"]), path=None)
    assert (backend.events, work.events) == before


async def test_what_comes_goes_to_the_vm_that_is_to_have_it(vms, keys):
    """By the most specific assignment, unless it was there, or is taken."""
    backend, work, other = vms
    other.running = False
    backend.devices["key"].ports = ["1", "2", "3"]
    assign(work, Port(backend, "*", "key"), "a-key")
    assign(work, Port(backend, "1", "key"), mode="required")
    assign(other, Port(backend, "1", "key"))
    assign(work, Port(backend, "*", "key"), "another-key")
    keys.devices_cache["sys-key"] = {"2": None}
    await change(keys, backend, {"1": None, "2": None, "3": other})
    assert keys.given == [("work", "sys-key:1:a-key", AssignmentMode.REQUIRED)]


@pytest.mark.parametrize(
    ("answer", "given"),
    [
        ("allow:other", [("other", "sys-key:1:a-key", AssignmentMode.AUTO)]),
        ("allow:nobody", []),
        ("deny", []),
        (OSError("no agent"), []),
    ],
)
async def test_of_several_vms_the_user_chooses_one(vms, keys, answer, given):
    backend, work, other = vms
    backend.devices["key"].ports = ["1"]
    assign(work, Port(backend, "1", "key"))
    assign(other, Port(backend, "1", "key"), mode="ask-to-attach")
    agent = unittest.mock.AsyncMock(side_effect=[answer])
    with unittest.mock.patch.object(changes, "call_socket_service", agent):
        await change(keys, backend, {"1": None})
    assert keys.given == given
    (_, service, _, question, _), _ = agent.call_args
    assert service == "device-agent.GUI"
    assert (question["targets"], question["argument"]) == (["work", "other"], "1")


async def test_nobody_sits_before_a_run(vms, keys):
    backend, work, other = vms
    backend.devices["key"].ports = ["1"]
    assign(work, Port(backend, "1", "key"))
    assign(other, Port(backend, "1", "key"))
    await change(keys, backend, {"1": None})
    assert keys.given == []


async def test_a_vm_that_ends_has_no_devices_of_others(vms, keys):
    _, work, other = vms
    keys.devices_cache["sys-key"] = {"1": work, "2": other, "3": None}
    keys.devices_cache["work"] = {"1": work}
    keys.devices_cache["gone"] = {"1": work}
    changes.detach_attached_devices_on_shutdown(keys, work, KeyDevice)
    await asyncio.gather(*changes._tasks)
    assert keys.devices_cache["sys-key"] == {"1": None, "2": other, "3": None}
    assert work.events == [("device-detach:key", "sys-key:1")]
    assert other.events == []
