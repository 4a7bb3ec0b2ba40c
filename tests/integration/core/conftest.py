"""An app with real guests, on the run's testbed."""

import pytest


@pytest.fixture
def app(testbed):
    app = testbed.portal.run(testbed.make_app("tiny"))
    yield app
    assert testbed.portal.run(testbed.close_app(app)) == []


@pytest.fixture
def run(testbed):
    return testbed.portal.run


@pytest.fixture
def make_vm(app, run):
    def make(name, cls="AppVM", **properties):
        vm = app.add_new_vm(cls, name=name, label="red", **properties)
        run(vm.create_on_disk())
        return vm

    return make


@pytest.fixture
def sh(run):
    """Run a command as root, and return its output without the last newline."""

    def sh(vm, command, user="root"):
        stdout, _ = run(vm.run_for_stdio(command, user=user))
        return stdout.decode().rstrip("\n")

    return sh
