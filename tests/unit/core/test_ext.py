"""Extensions: one object per class, called for events of VMs or of the app."""

import pytest

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


def test_handlers_hear_the_class_that_they_ask_for(app, template):
    listener = Listener()
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
    Slow()
    event = "test-extension-slow:1"
    effects = await template.fire_event_async(event)
    assert effects == ["tiny test-extension-slow:1", template]
    assert await app.domains["dom0"].fire_event_async(event) == []
    with pytest.raises(RuntimeError, match=r"Slow\.on_slow.* is asynchronous"):
        template.fire_event(event)


def test_there_is_one_object_of_a_class():
    assert Listener() is Listener()


def test_an_extension_can_be_taken_away_and_put_back(template):
    listener = Listener()
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
