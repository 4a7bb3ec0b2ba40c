"""What a call out of a VM is about: the VM that the policy was asked about."""

import asyncio

import pytest
from admin_client import AdminError, parse

from qubes_itests.admin.dispatch import METHODS, Dispatcher
from qubes_itests.admin.vm_calls import handle_vm_call


class Call:
    """A call whose payload ends when `stdin` does."""

    def __init__(self, service, target):
        self.service, self.target = service, target
        self.stdin, self.stdout = asyncio.StreamReader(), self
        self.written = b""

    def write(self, data):
        self.written += data

    def when_broken(self, callback):
        self.broken = callback


@pytest.fixture
def call(app, run):
    """Have `work` set a feature; do something before the payload ends."""
    dispatcher = Dispatcher(app, METHODS)

    async def handle(target, meanwhile):
        call = Call("admin.vm.feature.Set+by-work", target)
        handling = asyncio.create_task(
            handle_vm_call(dispatcher, app.domains["work"], call)
        )
        await asyncio.sleep(0)
        meanwhile()
        call.stdin.feed_data(b"1")
        call.stdin.feed_eof()
        assert await handling == 0
        return parse(call.written)

    return lambda target, meanwhile=lambda: None: run(handle(target, meanwhile))


def changed(app):
    return [vm.name for vm in app.domains if "by-work" in vm.features]


@pytest.mark.parametrize("target", ["dom0", "@adminvm", "$adminvm", "@default"])
def test_dom0_has_several_names(app, call, target):
    call(target)
    assert changed(app) == ["dom0"]


def test_a_vm_is_found_by_name_and_uuid(app, call):
    call("tiny")
    assert changed(app) == ["tiny"]
    del app.domains["tiny"].features["by-work"]
    call("uuid:" + str(app.domains["tiny"].uuid).upper())
    assert changed(app) == ["tiny"]


@pytest.mark.parametrize("target", ["late", "@dispvm", "uuid:" + "1" * 36])
def test_a_vm_that_is_made_meanwhile_is_not_meant(app, call, target):
    """The policy was asked about @default, and not about this VM."""

    def make():
        app.add_new_vm("AppVM", name="late", label="red")

    with pytest.raises(AdminError) as caught:
        call(target, make)
    assert caught.value.kind in {"QubesVMNotFoundError", "QubesException"}
    assert changed(app) == []


def test_a_vm_that_takes_the_name_of_another_meanwhile_is_not_meant(app, call):
    app.add_new_vm("AppVM", name="other", label="red")

    def replace():
        del app.domains["other"]
        app.add_new_vm("AppVM", name="other", label="red")

    with pytest.raises(AdminError) as caught:
        call("other", replace)
    assert caught.value.kind == "QubesVMNotFoundError"
    assert changed(app) == []
