"""The Admin API over its socket, with VMs that really run."""

import threading

import pytest
from admin_client import AdminError, Client

from qubes_itests.admin.server import AdminServer


@pytest.fixture
def app(testbed):
    app = testbed.portal.run(testbed.make_app("tiny"))
    yield app
    assert testbed.portal.run(testbed.close_app(app)) == []


@pytest.fixture
def client(app, testbed):
    server = AdminServer(app, app.directory / "qubesd.sock")
    testbed.portal.run(server.__aenter__())
    yield Client(server.path, timeout=600)
    testbed.portal.run(server.__aexit__(None, None, None))


def state(client, name):
    words = client.call("admin.vm.CurrentState", name).decode().split()
    return dict(word.split("=") for word in words)


def test_a_vm_is_created_run_reverted_and_removed(client, app, testbed):
    """As a user does it: every step by the socket, and each seen to have happened."""
    client.call("admin.vm.Create.AppVM", "dom0", "tiny", b"name=work label=red")
    with client.events() as events:
        next(events)
        client.call("admin.vm.Start", "work")
        names = []
        while "domain-start" not in names:
            names.append(next(events).name)
    assert names.index("domain-pre-start") < names.index("domain-spawn")
    running = state(client, "work")
    assert running["power_state"] == "Running"
    assert int(running["mem"]) > 0
    assert client.call("admin.vm.Console", "work").startswith(b"/")
    client.call("admin.vm.Pause", "work")
    assert state(client, "work")["power_state"] == "Paused"
    client.call("admin.vm.Unpause", "work")
    client.call("admin.vm.volume.Resize", "work", "private", str(3 << 30).encode())
    vm = app.domains["work"]
    look = "blockdev --getsize64 $(readlink -f /dev/xvdb)"
    size, _ = testbed.portal.run(vm.run_for_stdio(look, user="root"))
    assert int(size) == 3 << 30
    client.call("admin.vm.Shutdown", "work", "wait")
    assert state(client, "work")["power_state"] == "Halted"
    with pytest.raises(AdminError) as caught:
        client.call("admin.vm.Shutdown", "work", "force+wait")
    assert caught.value.kind == "QubesVMNotStartedError"
    revisions = client.call("admin.vm.volume.ListSnapshots", "work", "private").split()
    client.call("admin.vm.volume.Revert", "work", "private", revisions[-1])
    client.call("admin.vm.Remove", "work")
    assert b"work" not in client.call("admin.vm.List")


def test_stats_tell_of_running_vms(client):
    client.call("admin.vm.Create.AppVM", "dom0", "tiny", b"name=work label=red")
    client.call("admin.vm.Start", "work")
    with client.events(method="admin.vm.Stats") as events:
        assert next(events).name == "connection-established"
        told = next(events)
    assert (told.subject, told.name) == ("work", "vm-stats")
    assert list(told.values) == ["memory_kb", "cpu_time", "cpu_usage", "cpu_usage_raw"]
    assert int(told.values["memory_kb"]) > 0
    assert int(told.values["cpu_time"]) > 0
    client.call("admin.vm.Kill", "work")


def test_others_are_answered_while_a_vm_starts(client):
    client.call("admin.vm.Create.AppVM", "dom0", "tiny", b"name=work label=red")
    starting = threading.Thread(target=client.call, args=("admin.vm.Start", "work"))
    starting.start()
    states = set()
    while starting.is_alive():
        states.add(state(client, "work")["power_state"])
    starting.join()
    assert "Transient" in states
    client.call("admin.vm.Kill", "work")
