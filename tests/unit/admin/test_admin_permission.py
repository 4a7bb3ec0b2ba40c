"""Each method asks for permission before it does or tells anything."""

import pytest
from admin_client import AdminError, frame, parse
from admin_mutations import VALID, exchange, state_of

from qubes_itests.admin.dispatch import METHODS
from qubes_itests.core.exc import PermissionDenied

DEVICE = "dom0+sda:0000:0000::?******"
#: Right requests of the methods that the mutated ones leave out.
OTHERS = [
    frame("admin.deviceclass.List"),
    frame("admin.vm.Remove", "dvm"),
    frame("admin.label.List"),
    frame("admin.label.Index", "dom0", "red"),
    frame("admin.label.Create", "dom0", "pink", b"0xff00ff"),
    frame("admin.label.Remove", "dom0", "pink"),
    frame("admin.pool.List"),
    frame("admin.pool.ListDrivers"),
    frame("admin.pool.UsageDetails", "dom0", "default"),
    frame("admin.pool.Set.ephemeral_volatile", "dom0", "default", b"True"),
    frame("admin.pool.volume.List", "dom0", "default"),
    frame("admin.property.List"),
    frame("admin.property.GetAll"),
    frame("admin.property.GetDefault", "dom0", "default_netvm"),
    frame("admin.property.Help", "dom0", "default_netvm"),
    frame("admin.property.HelpRst", "dom0", "default_netvm"),
    frame("admin.property.Reset", "dom0", "default_template"),
    frame("admin.vm.property.HelpRst", "work", "memory"),
    *(frame(f"admin.vm.{act}", "work") for act in ("Unpause", "Suspend", "Resume")),
    frame("admin.vm.Console", "work"),
    frame("admin.vm.Create.StandaloneVM", "dom0", "", b"name=new label=red"),
    frame("admin.vm.Create.TemplateVM", "dom0", "", b"name=new label=red"),
    frame("admin.vm.Create.RemoteVM", "dom0", "", b"name=new label=red"),
    frame("admin.vm.Create.DispVM", "dom0", "dvm", b"name=new label=red"),
    *(
        frame(f"admin.vm.CreateInPool.{name}", "dom0", template, b"name=new label=red")
        for name, template in (
            ("StandaloneVM", ""),
            ("TemplateVM", ""),
            ("RemoteVM", ""),
            ("DispVM", "dvm"),
        )
    ),
    frame("admin.vm.feature.List", "work"),
    frame("admin.vm.feature.Get", "work", "os"),
    *(
        frame(f"admin.vm.feature.CheckWith{whom}", "work", "os")
        for whom in ("Netvm", "AdminVM", "TemplateAndAdminVM")
    ),
    frame("admin.vm.tag.List", "work"),
    frame("admin.vm.tag.Get", "work", "mine"),
    frame("admin.vm.volume.Clear", "work", "private"),
    frame("admin.vm.volume.Import", "work", "private", b"data"),
    frame("admin.vm.volume.Set.ephemeral", "work", "private", b"False"),
    frame("admin.vm.firewall.Get", "work"),
    frame("admin.vm.firewall.Reload", "work"),
    frame("admin.vm.notes.Get", "work"),
    frame("admin.backup.Execute", "dom0", "weekly"),
    frame("admin.backup.Cancel", "dom0", "weekly"),
    *(
        frame(f"admin.vm.device.{name}.{what}", "work", argument, payload)
        for name in ("block", "pci")
        for what, argument, payload in (
            ("Available", "", b""),
            ("Assigned", "", b""),
            ("Attached", "", b""),
            ("Assign", DEVICE, b"mode='required'"),
            ("Unassign", DEVICE, b""),
            ("Attach", DEVICE, b""),
            ("Detach", DEVICE, b""),
            ("Set.assignment", DEVICE, b"required"),
        )
    ),
]
#: Those whose payload must name what is there only after another call.
NEEDING_MORE = {
    "admin.vm.volume.CloneTo",
    "admin.vm.volume.Import",
    "admin.vm.volume.Revert",
}


def method_of(data):
    return data.partition(b"+")[0].decode()


@pytest.fixture
def vetoed(app):
    """Have dom0 be refused all, and return what it asked for."""
    asked = []

    def veto(_vm, event, **_kwargs):
        asked.append(event)
        raise PermissionDenied("nothing at all")

    app.domains["work"].template_for_dispvms = True
    app.add_new_vm("AppVM", name="dvm", label="red", template_for_dispvms=True)
    app.domains["dom0"].add_handler("admin-permission:*", veto)
    return asked


def test_nothing_is_done_or_told_without_permission(app, server, vetoed):
    before = state_of(app)
    refused = set()
    for data in (*VALID, *OTHERS):
        vetoed.clear()
        with pytest.raises(AdminError) as caught:
            parse(exchange(server.path, data))
        if caught.value.kind == "PermissionDenied":
            assert vetoed == [f"admin-permission:{method_of(data)}"]
            refused.add(method_of(data))
        assert state_of(app) == before
    assert set(METHODS) - refused == NEEDING_MORE
    assert app.saved == 0


def test_no_method_is_left_out():
    assert {method_of(data) for data in (*VALID, *OTHERS)} == set(METHODS)
