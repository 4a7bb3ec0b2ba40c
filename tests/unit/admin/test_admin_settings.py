"""Firewall rules, notes, power, and what is not available, over the Admin API."""

import pytest
from admin_client import AdminError

from qubes_itests.admin.dispatch import METHODS


def refusal(client, *call, **fields):
    with pytest.raises(AdminError) as caught:
        client.call(*call, **fields)
    return caught.value


def test_firewall_rules_are_stored_and_shown(client, app):
    assert client.call("admin.vm.firewall.Get", "work") == b"action=accept\n"
    heard = []
    app.domains["work"].add_handler(
        "firewall-changed", lambda _vm, event: heard.append(event)
    )
    rules = b"action=accept proto=tcp dst4=10.0.0.0/8 dstports=80\naction=drop\n"
    client.call("admin.vm.firewall.Set", "work", payload=rules)
    assert client.call("admin.vm.firewall.Get", "work") == (
        b"action=accept proto=tcp dst4=10.0.0.0/8 dstports=80-80\naction=drop\n"
    )
    client.call("admin.vm.firewall.Reload", "work")
    assert heard == ["firewall-changed"] * 2
    assert app.saved == 1


@pytest.mark.parametrize(
    ("payload", "kind"),
    [
        (b"action=drop\naction=accept dstports=80\n", "QubesValueError"),
        (b"action=drop\n\naction=drop\n", "QubesValueError"),
        (b"action=drop\x1caction=drop\n", "QubesDaemonAccessError"),
        (b"action=drop comment=a\0b\n", "QubesDaemonAccessError"),
    ],
)
def test_a_rule_that_cannot_be_leaves_all_as_they_were(client, app, payload, kind):
    error = refusal(client, "admin.vm.firewall.Set", "work", payload=payload)
    assert error.kind == kind
    assert app.domains["work"].firewall.rules == ["action=accept"]
    assert app.saved == 0


def test_notes_are_stored_and_what_does_not_show_is_replaced(client):
    assert client.call("admin.vm.notes.Get", "work") == b""
    text = "for é\n\t100% \u202eevil\x1b[31m"
    client.call("admin.vm.notes.Set", "work", payload=text.encode())
    shown = client.call("admin.vm.notes.Get", "work").decode()
    assert shown == "for é\n\t100% _evil_[31m"
    assert refusal(client, "admin.vm.notes.Set", "work", payload=b"\xff")


@pytest.mark.parametrize("name", ["Cancel", "Execute", "Info"])
def test_backups_are_answered_as_not_available(client, name):
    error = refusal(client, f"admin.backup.{name}", argument="weekly")
    assert error.kind == "QubesNotImplementedError"
    assert "no backups" in error.text


def test_the_state_of_a_halted_vm(client):
    state = client.call("admin.vm.CurrentState", "work").decode()
    assert state == "mem=0 mem_static_max=409600 cputime=0 power_state=Halted"
    assert "power_state=Running" in client.call("admin.vm.CurrentState").decode()


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("Shutdown", "QubesVMNotStartedError"),
        ("Kill", "QubesVMNotStartedError"),
        ("Pause", "QubesVMNotRunningError"),
        ("Unpause", "QubesVMNotPausedError"),
        ("Suspend", "QubesVMNotRunningError"),
        ("Resume", "QubesVMNotPausedError"),
        ("Console", "QubesVMNotRunningError"),
    ],
)
def test_a_halted_vm_is_told_to_be_started_first(client, method, kind):
    assert refusal(client, f"admin.vm.{method}", "work").kind == kind


@pytest.mark.parametrize("argument", ["wait", "force", "force+wait", "wait+force"])
def test_a_shutdown_takes_force_and_wait(client, argument):
    error = refusal(client, "admin.vm.Shutdown", "work", argument)
    assert error.kind == "QubesVMNotStartedError"


@pytest.mark.parametrize("argument", ["now", "force+force", "force+", "+"])
def test_a_shutdown_takes_nothing_else(client, argument):
    assert refusal(client, "admin.vm.Shutdown", "work", argument).kind == (
        "QubesDaemonAccessError"
    )


@pytest.mark.parametrize("method", ["Start", "Shutdown", "Kill"])
def test_dom0_cannot_be_started_or_stopped(client, method):
    assert "dom0" in refusal(client, f"admin.vm.{method}", "dom0").text


def test_all_methods_that_clients_use_are_there():
    used = [
        "admin.Events",
        "admin.backup.Cancel",
        "admin.backup.Execute",
        "admin.backup.Info",
        "admin.label.Create",
        "admin.label.Get",
        "admin.label.Index",
        "admin.label.List",
        "admin.label.Remove",
        "admin.pool.Add",
        "admin.pool.Info",
        "admin.pool.List",
        "admin.pool.ListDrivers",
        "admin.pool.Remove",
        "admin.pool.Set.ephemeral_volatile",
        "admin.pool.Set.revisions_to_keep",
        "admin.pool.UsageDetails",
        "admin.pool.volume.List",
        "admin.property.Get",
        "admin.property.GetAll",
        "admin.property.GetDefault",
        "admin.property.Help",
        "admin.property.List",
        "admin.property.Reset",
        "admin.property.Set",
        "admin.vm.Console",
        "admin.vm.Create.AppVM",
        "admin.vm.Create.StandaloneVM",
        "admin.vm.Create.TemplateVM",
        "admin.vm.CreateDisposable",
        "admin.vm.CreateInPool.AppVM",
        "admin.vm.CreateInPool.StandaloneVM",
        "admin.vm.CreateInPool.TemplateVM",
        "admin.vm.CurrentState",
        "admin.vm.Kill",
        "admin.vm.List",
        "admin.vm.Pause",
        "admin.vm.Remove",
        "admin.vm.Shutdown",
        "admin.vm.Start",
        "admin.vm.Stats",
        "admin.vm.Unpause",
        "admin.vm.feature.CheckWithAdminVM",
        "admin.vm.feature.CheckWithNetvm",
        "admin.vm.feature.CheckWithTemplate",
        "admin.vm.feature.CheckWithTemplateAndAdminVM",
        "admin.vm.feature.Get",
        "admin.vm.feature.List",
        "admin.vm.feature.Remove",
        "admin.vm.feature.Set",
        "admin.vm.firewall.Get",
        "admin.vm.firewall.Reload",
        "admin.vm.firewall.Set",
        "admin.vm.notes.Get",
        "admin.vm.notes.Set",
        "admin.vm.property.Get",
        "admin.vm.property.GetAll",
        "admin.vm.property.GetDefault",
        "admin.vm.property.Help",
        "admin.vm.property.List",
        "admin.vm.property.Reset",
        "admin.vm.property.Set",
        "admin.vm.tag.Get",
        "admin.vm.tag.List",
        "admin.vm.tag.Remove",
        "admin.vm.tag.Set",
        "admin.vm.volume.Clear",
        "admin.vm.volume.CloneFrom",
        "admin.vm.volume.CloneTo",
        "admin.vm.volume.Import",
        "admin.vm.volume.ImportWithSize",
        "admin.vm.volume.Info",
        "admin.vm.volume.List",
        "admin.vm.volume.ListSnapshots",
        "admin.vm.volume.Resize",
        "admin.vm.volume.Revert",
        "admin.vm.volume.Set.ephemeral",
        "admin.vm.volume.Set.revisions_to_keep",
        "admin.vm.volume.Set.rw",
        "admin.vmclass.List",
    ]
    assert sorted(set(used) - set(METHODS)) == []
