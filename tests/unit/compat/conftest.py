"""A testbed without guests: VMs whose commands are processes of this machine."""

# ruff: noqa: A002, ARG002, FBT002 - the signatures are those of the core

import asyncio
import signal
import subprocess
import uuid
from types import SimpleNamespace

import pytest

from qubes_itests.core.exc import QubesVMInUseError, QubesVMNotRunningError
from qubes_itests.core.policy import Policy
from qubes_itests.portal import Portal
from qubes_itests.run import testbed as testbed_module


@pytest.fixture(autouse=True)
def interruptible():
    """Have processes that tests start end by SIGINT, also where a shell ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class FakeVM:
    """Duck-types a VM: commands run in a shell here, services are given as commands."""

    def __init__(self, app, name, **properties):
        self.app = app
        self.name = name
        self.uuid = uuid.uuid4()
        self.default_user = "user"
        self.shutdown_timeout = 60
        self.netvm = None
        self.services = {}
        self.calls = []
        self.running = False
        self.processes = []
        self.commands = self
        self.__dict__.update(properties)

    def fire_event(self, event, **kwargs):
        pass

    def __str__(self):
        return self.name

    def __lt__(self, other):
        return self.name < other.name

    def is_running(self):
        return self.running

    def is_halted(self):
        return not self.running

    def check_unused(self):
        users = [vm for vm in self.app.domains.values() if vm.netvm is self]
        if users:
            raise QubesVMInUseError(self, f"{self} is used by {users}")

    async def create_on_disk(self):
        self.calls.append("create_on_disk")

    async def remove_from_disk(self):
        self.calls.append("remove_from_disk")

    async def clone_disk_files(self, src):
        self.calls.append(("clone_disk_files", src))

    async def start(self, start_guid=True):
        self.running = True
        return self

    async def shutdown(self, force=False, wait=False, timeout=None):
        self.running = not wait

    async def kill(self):
        self.running = False

    async def run(self, command, user=None, stdin=None, stdout=None, stderr=None):
        if not self.running:
            raise QubesVMNotRunningError(self)
        self.calls.append((command, user))
        none = subprocess.DEVNULL
        process = await asyncio.create_subprocess_exec(
            "sh",
            "-c",
            command,
            stdin=stdin or none,
            stdout=stdout or none,
            stderr=stderr or none,
        )
        self.processes.append(process)
        return process

    async def run_for_stdio(self, command, *, input=None, user=None):
        pipe = subprocess.PIPE
        process = await self.run(command, user, stdin=pipe, stdout=pipe, stderr=pipe)
        stdout, stderr = await process.communicate(input or b"")
        if process.returncode:
            raise subprocess.CalledProcessError(
                process.returncode, command, stdout, stderr
            )
        return stdout, stderr

    async def ask(self, command, what, *, timeout, input=b"", user="root"):
        return await self.run_for_stdio(command, input=input, user=user)

    async def ask_service(self, service, what, *, timeout, input=b"", user=None):
        command = self.services.get(service, "exit 127")
        return await self.ask(command, what, timeout=timeout, input=input, user=user)

    async def run_service(self, service, source=None, user=None, **streams):
        command = self.services.get(service, "exit 127")
        return await self.run(command, user, **streams)

    async def run_service_for_stdio(self, service, source=None, user=None, input=None):
        command = self.services.get(service, "exit 127")
        return await self.run_for_stdio(command, input=input, user=user)


class Domains(dict):
    """VMs under their names and under themselves, as in the core."""

    def __delitem__(self, vm):
        vm.check_unused()
        super().__delitem__(vm.name)
        super().__delitem__(vm)

    async def remove(self, vm):
        del self[vm]
        await vm.remove_from_disk()


class FakeApp:
    def __init__(self, template):
        self.domains = Domains()
        self.policy = Policy()
        self.default_dispvm = None
        self.handlers = []
        self.default_template = self.add_new_vm("TemplateVM", name=template)

    def fire_event(self, event, **kwargs):
        pass

    def add_handler(self, event, handler):
        self.handlers.append(handler)

    def add_new_vm(self, cls, name, **properties):
        vm = FakeVM(self, name, **properties)
        self.domains[name] = self.domains[vm] = vm
        for handler in self.handlers:
            handler(self, "domain-add", vm=vm)
        return vm

    async def create_vm(self, cls, name, **properties):
        vm = self.add_new_vm(cls, name, **properties)
        await vm.create_on_disk()
        return vm

    def save(self):
        pass


class FakeTestbed:
    run_templates = ("tiny", "big")

    def __init__(self, portal):
        self.portal = portal
        self.hypervisor = SimpleNamespace(domains=lambda **_spare: ())
        self.closed = 0
        self.problems = []

    async def make_app(self, template):
        return FakeApp(template)

    async def serve(self, app):
        pass

    async def close_app(self, app):
        self.closed += 1
        app.domains.clear()
        return self.problems


@pytest.fixture
def portal():
    with Portal() as portal:
        yield portal


@pytest.fixture
def bed(portal, monkeypatch):
    bed = FakeTestbed(portal)
    monkeypatch.setattr(testbed_module, "_current", [bed])
    return bed


@pytest.fixture
def fake_vm(portal):
    vm = FakeVM(None, "fake")
    yield vm
    for process in vm.processes:
        portal.run(process.wait(), timeout=30)
