"""An app whose guests follow a script, and bridges that are only names."""

import asyncio
from random import Random

import pytest
import pytest_asyncio
from scripted_hypervisor import ScriptedDomain, ScriptedHypervisor

from qubes_itests.core.app import Qubes
from qubes_itests.exc import DeadlineError
from qubes_itests.guest.image.template import Template
from qubes_itests.guest.start import links
from qubes_itests.host.bridge import Bridge, Tap
from qubes_itests.hypervisor.exc import HypervisorError
from qubes_storage.reflink import ReflinkPool

MIB = 1024**2


class Host:
    """What there is on the host, by name; and all that happened, in order."""

    def __init__(self):
        self.bridges = {}
        self.taps = {}
        self.filters = {}
        #: Hardware addresses of interfaces that their guests do not let go of.
        self.stubborn = set()
        self.done = []


@pytest.fixture
def host(monkeypatch):
    host = Host()

    class NamedBridge(Bridge):
        @classmethod
        def create(cls):
            bridge = cls(f"bridge{len(host.done)}")
            host.bridges[bridge.name] = bridge
            host.done.append("bridge made")
            return bridge

        def remove(self):
            del host.bridges[self.name]
            host.done.append("bridge removed")

    class NamedTap(Tap):
        @classmethod
        def create(cls, bridge, mac, sources=None):
            assert bridge.name in host.bridges
            tap = cls(f"tap{len(host.done)}")
            host.taps[tap.name] = bridge.name
            host.done.append(f"tap made for {mac}")
            if sources is not None:
                tap.filter(mac, sources)
            return tap

        def filter(self, mac, sources):
            host.filters[mac] = [str(source) for source in sources]

        def cut(self):
            host.taps[self.name] = None
            host.done.append("tap cut")

        def remove(self):
            host.taps.pop(self.name, None)
            host.done.append("tap removed")

    monkeypatch.setattr(links, "Bridge", NamedBridge)
    monkeypatch.setattr(links, "Tap", NamedTap)
    return host


@pytest.fixture(autouse=True)
def interfaces(monkeypatch, host):
    """Have scripted domains take interfaces, but for addresses in `failing`."""

    async def attach(self, interface):
        attached = self.__dict__.setdefault("interfaces", {})
        self.hypervisor.fail_perhaps(self, f"attach {interface.mac}")
        if interface.mac in attached:
            raise HypervisorError(self.spec.name, "attach", "it is attached")
        attached[interface.mac] = interface.tap
        host.done.append(f"{self.spec.name} has {interface.mac}")

    async def detach(self, mac):
        if mac not in self.__dict__.get("interfaces", {}):
            raise HypervisorError(self.spec.name, "detach", "it has none")
        if mac in host.stubborn:
            raise DeadlineError("release", 10)
        del self.interfaces[mac]
        host.done.append(f"{self.spec.name} lost {mac}")

    monkeypatch.setattr(ScriptedDomain, "attach_interface", attach)
    monkeypatch.setattr(ScriptedDomain, "detach_interface", detach)


@pytest_asyncio.fixture
async def app(tmp_path):
    hypervisor = ScriptedHypervisor(Random(1))  # noqa: S311 - to be repeated
    hypervisor.networked = True
    kernels = {"tiny": Template("tiny", tmp_path, tmp_path, tmp_path)}
    app = Qubes(hypervisor=hypervisor, directory=tmp_path, kernels=kernels)
    await app.add_pool(
        ReflinkPool(name="default", dir_path=tmp_path / "pool", setup_check=False)
    )
    return app


@pytest.fixture
def make_vm(app):
    async def make(name, **properties):
        sizes = {volume: {"size": MIB} for volume in ("root", "private", "volatile")}
        vm = app.add_new_vm(
            "StandaloneVM", name=name, label="red", volume_config=sizes, **properties
        )
        await vm.create_on_disk()
        return vm

    return make


@pytest.fixture
def net_vms(tmp_path):
    """Return five net VMs of an app that never starts any."""
    app = Qubes(hypervisor=None, directory=tmp_path)
    pool = ReflinkPool(name="default", dir_path=tmp_path / "pool", setup_check=False)
    asyncio.run(app.add_pool(pool))
    return [
        app.add_new_vm("TemplateVM", name=f"n{n}", label="red", provides_network=True)
        for n in range(5)
    ]
