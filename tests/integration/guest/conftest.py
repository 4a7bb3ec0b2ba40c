"""Guests of the mini template, on the QEMU back end."""

import contextlib
import inspect
import shutil
import tempfile
import uuid
from pathlib import Path

import pytest

from qubes_itests.guest.link.agent import Identity
from qubes_itests.guest.start.boot import boot
from qubes_itests.host.command import run
from qubes_itests.hypervisor.contract import Disk, DomainSpec

MIB = 1 << 20


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Run the coroutines among the tests here on the loop of the run's testbed.

    A process has one connection to libvirt's embedded driver, on one loop.
    """
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    pyfuncitem.funcargs["hypervisor_portal"].run(pyfuncitem.obj(**arguments))
    return True


@pytest.fixture(autouse=True)
def hypervisor_portal(testbed, hypervisor):
    """Return what runs coroutines; no domain outlives a test."""
    yield testbed.portal
    for domain in hypervisor.domains():
        testbed.portal.run(domain.undefine())


@pytest.fixture
def hypervisor(testbed):
    return testbed.hypervisor


@pytest.fixture
def cache(testbed):
    return testbed.parts.cache


@pytest.fixture
def template(testbed):
    return testbed.template("tiny")


@pytest.fixture
def directory():
    """Return a directory with a short path, as sockets want it."""
    with tempfile.TemporaryDirectory(prefix="qi") as path:
        yield Path(path)


@pytest.fixture
def warm(testbed):
    return testbed.warm_starts


class Machines:
    """Makes the disks of VMs, and boots them."""

    def __init__(self, directory, template, hypervisor):
        self.directory = directory
        self.template = template
        self.hypervisor = hypervisor

    def spec(self, name, *, private=64 * MIB, **changes):
        place = self.directory / name
        place.mkdir()
        shutil.copyfile(self.template.root_image, place / "root.img")
        run(["mke2fs", "-q", "-t", "ext4", place / "private.img", f"{private >> 10}k"])
        with (place / "volatile.img").open("wb") as file:
            file.truncate(32 * MIB)
        names = {"xvda": "root", "xvdb": "private", "xvdc": "volatile"}
        disks = [Disk(disk, place / f"{file}.img") for disk, file in names.items()]
        values = {
            "name": name,
            "uuid": uuid.uuid4(),
            "directory": place,
            "memory": 192,
            "max_memory": 192,
            "kernel": self.template.kernel,
            "initramfs": self.template.initramfs,
            "disks": tuple(disks),
        }
        return DomainSpec(**{**values, **changes})

    def identity(self, name, **changes):
        disks = {"root": "xvda", "private": "xvdb", "volatile": "xvdc"}
        return Identity(**{"name": name, **disks, **changes})

    async def boot(self, spec, *, timeout=600, warm=None, identity=None, **kwargs):
        identity = identity or self.identity(spec.name)
        return await boot(
            self.hypervisor, spec, identity, timeout=timeout, warm=warm, **kwargs
        )

    @contextlib.asynccontextmanager
    async def running(self, name, *, warm=None, **kwargs):
        domain, agent = await self.boot(self.spec(name), warm=warm, **kwargs)
        yield agent
        await agent.close()
        await domain.undefine()


@pytest.fixture
def machines(directory, template, hypervisor):
    return Machines(directory, template, hypervisor)


@pytest.fixture
def sh():
    """Run a command in a guest; it must succeed, and say nothing on stderr."""

    async def sh(agent, command, *, user="root", data=b""):
        process = await agent.spawn(command, user=user)
        stdout, stderr = await process.communicate(data)
        assert (process.returncode, stderr) == (0, b""), command
        return stdout.decode().rstrip("\n")

    return sh
