"""Extensions: one object per class, called for events of VMs or of the app."""

import pytest

from qubes_itests.core.app import Qubes
from qubes_itests.core.device.block import BlockDeviceExtension
from qubes_itests.core.event_names import declare
from qubes_itests.core.ext import Extension, handler, registered_extensions
from qubes_itests.core.vm.qubesvm import QubesVM
from qubes_itests.core.vm.templatevm import TemplateVM

declare("test-extension-vm", "test-extension-app", "test-extension-slow:*")


class Listener(Extension):
    def __init__(self):
        self.heard = []

    @handler("test-extension-vm")
    def on_any_vm(self, vm, event, **kwargs):
        self.heard.append((vm.name, event, kwargs))

    @handler("test-extension-vm", vm=TemplateVM)
    def on_template(self, vm, _event, **_kwargs):
        self.heard.append(("template", vm.name))

    @handler("test-extension-app", system=True)
    def on_app(self, _app, event):
        self.heard.append(event)


@pytest.fixture
def other(tmp_path):
    """Make an app beside the first one, from which on it is the last."""
    return Qubes(hypervisor=None, directory=tmp_path / "other")


@pytest.fixture
def listener():
    """Make sure that the tests to come begin without it."""
    yield (listener := Listener())
    listener.unregister()


def test_handlers_hear_the_class_that_they_ask_for(app, template, listener):
    vm = app.add_new_vm("AppVM", name="work", label="red", template=template)
    vm.fire_event("test-extension-vm", answer=42)
    template.fire_event("test-extension-vm")
    app.fire_event("test-extension-app")
    assert listener.heard == [
        ("work", "test-extension-vm", {"answer": 42}),
        ("tiny", "test-extension-vm", {}),
        ("template", "tiny"),
        "test-extension-app",
    ]


class Slow(Extension):
    @handler("test-extension-slow:*", vm=QubesVM)
    async def on_slow(self, vm, event, **_kwargs):
        return [f"{vm} {event}"]

    @handler("test-extension-slow:*", vm=QubesVM)
    def on_slow_too(self, vm, _event, **_kwargs):
        yield vm


@pytest.mark.asyncio
async def test_handlers_may_be_asynchronous_or_yield(app, template):
    """They are methods; dom0 is of another class than they listen to."""
    slow = Slow()
    event = "test-extension-slow:1"
    try:
        effects = await template.fire_event_async(event)
        assert effects == ["tiny test-extension-slow:1", template]
        assert await app.domains["dom0"].fire_event_async(event) == []
        with pytest.raises(RuntimeError, match=r"Slow\.on_slow.* is asynchronous"):
            template.fire_event(event)
    finally:
        slow.unregister()


def test_there_is_one_object_of_a_class(listener):
    assert Listener() is listener


def test_an_extension_can_be_taken_away_and_put_back(template, listener):
    listener.unregister()
    listener.unregister()
    template.fire_event("test-extension-vm")
    assert listener.heard == []
    assert listener not in registered_extensions()
    listener.register()
    template.fire_event("test-extension-vm")
    assert listener.heard == [("tiny", "test-extension-vm", {}), ("template", "tiny")]
    listener.unregister()
    assert Listener() is listener
    assert listener in registered_extensions()


def fire(app, heard):
    """Fire events on an app and on its dom0; return who the listener hears then."""
    heard.clear()
    app.domains["dom0"].fire_event("test-extension-vm")
    app.fire_event("test-extension-app")
    return len(heard)


def test_an_app_gets_what_is_registered_when_it_is_made(app, listener, tmp_path):
    """And loses what is unregistered, whichever it is of."""
    listener.unregister()
    assert fire(app, listener.heard) == 0
    listener.register()
    apps = [app, Qubes(hypervisor=None, directory=tmp_path / "later")]
    assert [fire(each, listener.heard) for each in apps] == [2, 2]
    assert [listener in each.extensions for each in apps] == [True, True]
    listener.unregister()
    assert [fire(each, listener.heard) for each in apps] == [0, 0]


def test_an_extension_of_one_app_does_not_answer_in_another(app, other):
    """What a test makes is of the app that was made last."""
    listener = Listener()
    try:
        assert (fire(app, listener.heard), fire(other, listener.heard)) == (0, 2)
        app.extensions.add(listener)
        other.extensions.remove(listener)
        assert (fire(app, listener.heard), fire(other, listener.heard)) == (2, 0)
    finally:
        listener.unregister()


def test_the_last_app_is_one_that_is_open(app, other):
    other.close()
    other.close()
    listener = Listener()
    try:
        assert (fire(app, listener.heard), fire(other, listener.heard)) == (2, 0)
    finally:
        listener.unregister()


def test_each_app_has_objects_of_its_own_of_the_extensions_of_the_core(app, other):
    """What they keep of VMs, they keep of those of one app."""
    own = [{type(e): e for e in each.extensions} for each in (app, other)]
    assert own[0].keys() == own[1].keys() >= {BlockDeviceExtension}
    assert all(own[0][cls] is not own[1][cls] for cls in own[0])
    assert not own[0].keys() & {type(e) for e in registered_extensions()}


def test_an_app_has_one_extension_of_a_class(app, listener):
    app.extensions.add(listener)
    app.extensions.add(listener)
    assert fire(app, listener.heard) == 2
    BlockDeviceExtension()
    try:
        assert app.domains["dom0"].fire_event("device-list:block") == []
        assert [type(e) for e in app.extensions].count(BlockDeviceExtension) == 1
    finally:
        BlockDeviceExtension().unregister()


class Holder(Extension):
    @handler("qubes-close", system=True)
    def on_close(self, _app, _event):
        if self.devices_cache.pop("work", None) is None:
            raise RuntimeError("nothing was held")


@pytest.mark.asyncio
async def test_extensions_hear_that_an_app_is_closed(app):
    holder = Holder()
    holder.devices_cache["work"] = {"1": app}
    try:
        app.close()
        assert (dict(holder.devices_cache), app.problems) == ({}, [])
        app.close()
        assert len(app.problems) == 1
        assert "nothing was held" in app.problems.pop()
    finally:
        holder.unregister()
