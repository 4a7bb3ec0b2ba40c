"""The Admin API called from within VMs: denied, unless policy says otherwise."""

import pytest
from admin_client import AdminError, parse, wait_until


@pytest.fixture
def app(testbed):
    app = testbed.portal.run(testbed.make_app("tiny"))
    yield app
    assert testbed.portal.run(testbed.close_app(app)) == []


@pytest.fixture
def mgmt(app, testbed):
    """Start a VM that may become an administrator's."""

    async def make():
        for name in ("mgmt", "vault"):
            vm = app.add_new_vm("AppVM", name=name, label="red")
            await vm.create_on_disk()
        await app.domains["mgmt"].start()
        return app.domains["mgmt"]

    return testbed.portal.run(make())


@pytest.fixture
def call(mgmt, testbed):
    async def communicate(command, data):
        process = await mgmt.run(command, stdin=-1, stdout=-1, stderr=-1)
        stdout, _ = await process.communicate(data)
        return process.returncode, stdout

    return lambda command, data=b"": testbed.portal.run(communicate(command, data))


def test_vms_may_not_call_unless_policy_says_so(call, app):
    for target in ("dom0", "vault", "@adminvm"):
        status, answer = call(f"qrexec-client-vm {target} admin.vm.List")
        assert (status, answer) == (126, b"")
    assert "vault" in app.domains


def test_policy_allows_one_method_on_one_vm(call, app):
    app.policy.add_rule("admin.vm.tag.Set * mgmt vault allow target=dom0")
    status, answer = call("qrexec-client-vm vault admin.vm.tag.Set+mine")
    assert (status, parse(answer)) == (0, b"")
    assert "mine" in app.domains["vault"].tags
    assert call("qrexec-client-vm vault admin.vm.tag.Remove+mine")[0] == 126
    assert call("qrexec-client-vm dom0 admin.vm.tag.Set+mine")[0] == 126


def test_the_payload_and_errors_come_through(call, app):
    app.policy.add_rule("admin.vm.property.Set * mgmt vault allow target=dom0")
    status, answer = call("qrexec-client-vm vault admin.vm.property.Set+memory", b"501")
    assert (status, parse(answer)) == (0, b"")
    assert app.domains["vault"].memory == 501
    _, answer = call("qrexec-client-vm vault admin.vm.property.Set+memory", b"much")
    with pytest.raises(AdminError) as caught:
        parse(answer)
    assert caught.value.kind == "QubesPropertyValueError"


def test_a_handler_knows_who_calls(call, app):
    asked = []
    app.domains["mgmt"].add_handler(
        "admin-permission:admin.vm.List",
        lambda vm, _event, dest, **_: asked.append((vm.name, dest.name)),
    )
    app.policy.add_rule("admin.vm.List * mgmt @adminvm allow")
    app.policy.add_rule("admin.vm.List * mgmt vault allow target=dom0")
    _, answer = call("qrexec-client-vm dom0 admin.vm.List")
    names = [line.split()[0] for line in parse(answer).splitlines()]
    assert names == [b"dom0", b"vault"]
    assert asked == [("mgmt", "dom0")]


def test_a_payload_without_end_is_cut_off(call, app):
    app.policy.add_rule("admin.vm.notes.Set * mgmt vault allow target=dom0")
    status, answer = call(
        "head -c 10000000 /dev/zero | qrexec-client-vm vault admin.vm.notes.Set"
    )
    assert (status, answer) == (126, b"")
    assert app.domains["vault"].notes == ""


def test_events_reach_a_vm_until_it_goes(mgmt, app, testbed):
    """The caller is killed while nothing happens, and nothing of it is left."""
    app.policy.add_rule("admin.Events * mgmt vault allow target=dom0")
    vault = app.domains["vault"]
    hello = b"1\0\0connection-established\0\0"
    told = b"1\0vault\0something\0\0"

    async def listen():
        process = await mgmt.run(
            "exec qrexec-client-vm vault admin.Events < /dev/null", stdout=-1
        )
        assert await process.stdout.readexactly(len(hello)) == hello
        vault.fire_event("something")
        assert await process.stdout.readexactly(len(told)) == told
        process.kill()
        await process.wait()

    testbed.portal.run(listen())
    wait_until(lambda: not vault._instance_handlers)
