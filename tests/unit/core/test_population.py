"""Any sequence of making, cloning, changing, starting, removing VMs holds together."""

import asyncio
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from scripted_app import make_app, make_vm

from qubes_itests.core.exc import QubesException
from qubes_itests.core.vm.base import BaseVM
from qubes_itests.core.vm.dispvm import DispVM

NAMES = ("a", "b", "c", "d")
numbers = st.integers(0, 9)

#: What was done, and not refused.
done = Counter()


class Population(RuleBasedStateMachine):
    """What is refused changes nothing; what is done leaves no loose end."""

    def __init__(self):
        super().__init__()
        self.runner = asyncio.Runner()
        self.directory = Path(tempfile.mkdtemp())

    @initialize()
    def begin(self):
        self.app = self.runner.run(make_app(self.directory))
        base = make_vm(self.app, "AppVM", "base", template_for_dispvms=True)
        self.app.default_dispvm = self.runner.run(base)

    def teardown(self):
        if hasattr(self, "app"):
            self.runner.run(self.app.kill_all())
            self.app.close()
            # it removes files in a thread of its own
            self.runner.run(self.app.pools["default"].destroy())
        self.runner.close()
        shutil.rmtree(self.directory)

    def pick(self, number):
        vms = [vm for vm in self.app.domains if vm.klass != "AdminVM"]
        return vms[number % len(vms)]

    def attempt(self, action):
        async def act():
            effect = action()
            if asyncio.iscoroutine(effect):
                await effect

        before = self.app.domains.keys()
        try:
            self.runner.run(act())
        except QubesException:
            assert self.app.domains.keys() == before
        else:
            done[sys._getframe(1).f_code.co_name] += 1

    @rule(cls=st.sampled_from(["TemplateVM", "AppVM", "StandaloneVM"]), n=numbers)
    def make(self, cls, n):
        name = NAMES[n % len(NAMES)]
        if name not in self.app.domains:
            net = {"provides_network": n % 2 == 0}
            self.attempt(lambda: make_vm(self.app, cls, name, **net))

    @rule(n=numbers, m=numbers)
    def clone(self, n, m):
        self.attempt(lambda: self.app.clone_vm(self.pick(n), NAMES[m % len(NAMES)]))

    @rule(n=numbers)
    def make_disposable(self, n):
        base = self.app.default_dispvm if n % 2 else self.pick(n)
        self.attempt(lambda: DispVM.from_appvm(base))

    @rule(n=numbers)
    def remove(self, n):
        self.attempt(lambda: self.app.domains.remove(self.pick(n)))

    @rule(n=numbers)
    def start(self, n):
        self.attempt(self.pick(n).start)

    @rule(n=numbers)
    def kill(self, n):
        self.attempt(self.pick(n).kill)

    @rule(
        n=numbers,
        m=numbers,
        name=st.sampled_from(["template", "default_dispvm", "netvm"]),
    )
    def refer(self, n, m, name):
        vm, other = self.pick(n), self.pick(m)
        if hasattr(type(vm), name):
            self.attempt(lambda: setattr(vm, name, other))

    @rule(n=numbers, value=st.booleans())
    def allow_disposables(self, n, value):
        self.attempt(lambda: setattr(self.pick(n), "template_for_dispvms", value))

    @rule(n=numbers)
    def default(self, n):
        self.attempt(lambda: setattr(self.app, "default_dispvm", self.pick(n)))

    @rule()
    def no_default(self):
        self.app.default_dispvm = None

    @invariant()
    def all_are_found(self):
        if not hasattr(self, "app"):
            return
        for vm in self.app.domains:
            for key in (vm.name, vm.qid, vm.uuid, vm):
                assert self.app.domains[key] is vm

    @invariant()
    def nothing_refers_to_what_is_gone(self):
        if not hasattr(self, "app"):
            return
        for holder in (self.app, *self.app.domains):
            for prop in holder.property_list():
                value = getattr(holder, prop.name, None)
                if isinstance(value, BaseVM):
                    assert value in self.app.domains, (holder, prop.name)

    @invariant()
    def disks_and_domains_are_those_of_vms(self):
        if not hasattr(self, "app"):
            return
        names = set(self.app.domains.keys())
        pool = self.app.pools["default"]
        assert {p.parent.name for p in pool.dir_path.rglob("*.img*")} <= names
        assert {v.vid.split("/")[1] for v in pool.list_volumes()} <= names
        running = {vm.name for vm in self.app.domains if vm.is_running()} - {"dom0"}
        assert {d.spec.name for d in self.app.hypervisor.domains()} == running
        assert self.app.problems == []

    @invariant()
    def snapshots_have_sources(self):
        if not hasattr(self, "app"):
            return
        for vm in self.app.domains:
            for volume in getattr(vm, "volumes", {}).values():
                if volume.source is not None:
                    owner = volume.source.vid.split("/")[1]
                    assert owner in self.app.domains, (vm.name, volume.name)


def test_population():
    run_state_machine_as_test(
        Population,
        settings=settings(
            max_examples=15,
            stateful_step_count=40,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    refused_all = {"clone", "make_disposable", "remove", "start", "kill"} - set(done)
    assert not refused_all, "the steps do not get far"
