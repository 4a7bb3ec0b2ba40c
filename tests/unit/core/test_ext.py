"""Extensions: one object per class, called for events of VMs or of the app."""

from qubes_itests.core.ext import Extension, handler
from qubes_itests.core.vm.templatevm import TemplateVM


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


def test_there_is_one_object_of_a_class():
    assert Listener() is Listener()
