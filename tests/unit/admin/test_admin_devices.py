"""Devices over the Admin API: exposed, assigned, attached."""

import pytest
from admin_client import AdminError

from qubes_itests.core.device.info import DeviceInfo
from qubes_itests.core.device.port import Port

DEVICE = "dom0+sda:0000:0000::?******"


def refusal(client, *call, **fields):
    with pytest.raises(AdminError) as caught:
        client.call(*call, **fields)
    return caught.value


def device_call(client, what, argument="", payload=b"", vm="work"):
    return client.call(f"admin.vm.device.block.{what}", vm, argument, payload).decode()


@pytest.fixture(autouse=True)
def exposed(app):
    """Dom0 exposes two block devices."""
    dom0 = app.domains["dom0"]
    devices = {
        port: DeviceInfo(Port(dom0, port, "block"), name=f"disk {port}")
        for port in ("sda", "sdb")
    }
    dom0.add_handler("device-list:block", lambda *_args: list(devices.values()))
    dom0.add_handler(
        "device-get:block", lambda _vm, _event, port_id: devices.get(port_id)
    )
    return devices


def test_classes_are_listed(client):
    assert client.call("admin.deviceclass.List") == b"block\npci\n"


def test_exposed_devices_are_listed(client, exposed):
    lines = device_call(client, "Available", vm="dom0").splitlines()
    assert lines == [
        f"{port}:0000:0000::?****** {device.serialize().decode()}"
        for port, device in exposed.items()
    ]
    assert device_call(client, "Available", "sdb", vm="dom0").startswith("sdb:")
    assert device_call(client, "Available", "sdc", vm="dom0") == ""
    assert device_call(client, "Available") == ""


def test_a_device_is_assigned_changed_and_unassigned(client, app):
    device_call(client, "Assign", DEVICE, b"mode='required' _read-only='yes'")
    assert app.saved == 1
    listed = device_call(client, "Assigned")
    assert listed.startswith(f"{DEVICE} ")
    assert "mode='required'" in listed
    assert "_read-only='yes'" in listed
    assert device_call(client, "Assigned", DEVICE) == listed
    assert device_call(client, "Assigned", "dom0+sdb") == ""
    assert device_call(client, "Attached") == ""
    device_call(client, "Set.assignment", DEVICE, b"auto-attach")
    assert "mode='auto-attach'" in device_call(client, "Assigned")
    device_call(client, "Unassign", DEVICE)
    assert device_call(client, "Assigned") == ""
    assert app.saved == 3


def test_a_device_has_the_name_that_client_tools_send(client):
    """The bytes of ``qvm-block assign --required work dom0:sda``, and of its end."""
    sent = "dom0+sda+0000+0000++_______"
    payload = (
        b"device_id='0000:0000::?******' port_id='sda' devclass='block'"
        b" backend_domain='dom0' mode='required' frontend_domain='work'"
    )
    device_call(client, "Assign", sent, payload)
    listed = device_call(client, "Assigned")
    assert listed.startswith(f"{DEVICE} ")
    assert device_call(client, "Assigned", sent) == listed
    device_call(client, "Unassign", sent)
    assert device_call(client, "Assigned") == ""


def test_a_halted_vm_gets_no_device(client):
    error = refusal(client, "admin.vm.device.block.Attach", "work", DEVICE)
    assert error.kind == "QubesVMNotRunningError"


@pytest.mark.parametrize(
    "row",
    [
        ("Assign", "", b"", "QubesDaemonAccessError"),
        ("Assign", "dom0", b"", "QubesDaemonAccessError"),
        ("Assign", "nobody+sda", b"", "QubesVMNotFoundError"),
        ("Assign", DEVICE, b"mode='sometimes'", "QubesDaemonAccessError"),
        ("Assign", DEVICE, b"nonsense", "QubesDaemonAccessError"),
        (
            "Assign",
            DEVICE,
            b"mode='required' port_id='sdb'",
            "QubesDaemonAccessError",
        ),
        (
            "Assign",
            DEVICE,
            b"mode='required' frontend_domain='tiny'",
            "QubesDaemonAccessError",
        ),
        ("Unassign", DEVICE, b"x", "QubesDaemonAccessError"),
        ("Set.assignment", DEVICE, b"manual", "QubesDaemonAccessError"),
        ("Set.assignment", DEVICE, b"", "QubesDaemonAccessError"),
    ],
)
def test_what_cannot_be_is_refused(client, app, row):
    what, argument, payload, kind = row
    name = f"admin.vm.device.block.{what}"
    assert refusal(client, name, "work", argument, payload).kind == kind
    assert device_call(client, "Assigned") == ""
    assert app.saved == 0


def test_a_class_that_is_not_there_has_no_methods(client):
    error = refusal(client, "admin.vm.device.teapot.Available", "work")
    assert error.kind == "QubesDaemonAccessError"
