"""VMs on the template `debian-12`, which `template build` has made before."""

import pytest


class Pair:
    """Two running VMs of one app, of which `work` may call any service of `vault`."""

    def __init__(self, testbed, init):
        self.run = testbed.portal.run
        self.init = init
        self.app = self.run(testbed.make_app("debian-12"))
        self.app.policy.add_rule("* * work @anyvm allow target=vault")
        if init != "agent":
            self.app.default_template.features["init"] = init
        self.work, self.vault = self.make("work"), self.make("vault")

    def make(self, name):
        """Make a VM with two services, and start it."""
        vm = self.app.add_new_vm("AppVM", name=name, label="red")
        vm.features["service.test"] = True
        vm.features["service.other"] = False
        self.run(vm.create_on_disk())
        self.run(vm.start())
        return vm

    def sh(self, vm, command, user=None, data=b""):
        """Run a command, which must succeed; return its output."""
        call = vm.run_for_stdio(command, user=user, input=data)
        return self.run(call)[0].decode().rstrip("\n")


@pytest.fixture(scope="module", params=["agent", "systemd"])
def init(request):
    return request.param


@pytest.fixture(scope="module")
def pair(testbed, init):
    """Return two VMs with one init; each costs a start, so all tests share them."""
    pair = Pair(testbed, init)
    yield pair
    assert testbed.portal.run(testbed.close_app(pair.app)) == []


@pytest.fixture
def sh(pair):
    return pair.sh
