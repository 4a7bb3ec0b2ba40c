"""The little of a core that is asked for: its store, and VMs that start."""

import asyncio
import os
import pathlib
import subprocess
import types
import uuid

import libvirt
import qubesdb

from qubes import config

XML = """
<domain type="xen">
  <name>{name}</name><uuid>{uuid}</uuid>
  <memory unit="MiB">200</memory><currentMemory unit="MiB">200</currentMemory>
  <vcpu placement="static">2</vcpu>
  <os><type>xenpvh</type><kernel>/var/lib/qubes/vm-kernels/{kernel}/vmlinuz</kernel></os>
  <devices>
    <disk type="block" device="disk"><source dev="{root}"/><target dev="xvda"/></disk>
    <disk type="block" device="disk"><source dev="{private}"/><target dev="xvdb"/></disk>
    <console type="pty"><target type="xen" port="0"/></console>
  </devices>
</domain>
"""


async def run_program(name, *words, stdin=b"in\n"):
    """Return exit status, stdout and stderr of a program of dom0."""
    process = await asyncio.create_subprocess_exec(
        *(config.system_path.get(f"{name}_path", name), *words),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    stdout, stderr = await process.communicate(stdin)
    return process.returncode, stdout, stderr


async def start(domain):
    """Start a domain with the calls of core-admin in their order."""
    domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
    assert domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED
    name, number = domain.name(), str(domain.ID())
    assert (await run_program("qubesdb_daemon", number, name))[0] == 0
    database = qubesdb.QubesDB(name)
    database.write("/name", name)
    database.write("/default-user", "user")
    domain.resume()
    words = ("-q", "-u", domain.UUIDString(), "--", number, name, "user")
    done = await run_program("qrexec_daemon", *words)
    assert done[0] == 0, done
    return database


class Storage:
    """Images of one VM."""

    def __init__(self, directory):
        self.directory = directory

    async def import_data(self, volume, size):
        path = self.directory / f"{volume}.img"
        path.touch()
        os.truncate(path, size)
        return str(path)

    async def import_data_end(self, volume, success):
        assert success, volume


class PropertyHolder:
    """Something with properties, each with a default."""

    defaults = types.MappingProxyType({})

    def property_list(self):
        return [types.SimpleNamespace(__name__=name) for name in self.defaults]

    def property_get_default(self, name):
        return self.defaults[name]

    def property_is_default(self, name):
        return name not in vars(self)


class VM(PropertyHolder):
    """A VM: properties, and a folder for images."""

    defaults = types.MappingProxyType({"memory": 200})
    memory = 200

    def __init__(self, app, klass, **properties):
        vars(self).update(properties)
        self.klass = klass
        self.features = {}
        folder = "appvms" if klass == "AppVM" else "vm-templates"
        self.storage = Storage(app.path.parent / folder / self.name)

    async def create_on_disk(self):
        self.storage.directory.mkdir()
        if self.klass == "AppVM":
            templates = self.storage.directory.parent.with_name("vm-templates")
            source = templates / self.template / "root.img"
            target = self.storage.directory / "root.img"
            await run_program("cp", "--reflink=always", source, target)
            await self.storage.import_data("private", 64 << 20)

    async def start(self, *, start_guid=True):
        images = self.storage.directory
        root, private = images / "root.img", images / "private.img"
        values = {"root": root, "private": private, "kernel": self.template}
        xml = XML.format(name=self.name, uuid=uuid.uuid4(), **values)
        await start(libvirt.open().defineXML(xml))


class Domains(dict):
    """VMs by name; dom0 is always there."""

    def __missing__(self, name):
        return VM(self.app, "AdminVM", name=name, template="-")


class Qubes(PropertyHolder):
    """A store: names of VMs, of their templates and features, a VM a line."""

    def __init__(self, path):
        self.path = pathlib.Path(path)
        self.domains = Domains()
        self.domains.app = self
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                klass, name, template, *features = line.split()
                vm = self.add_new_vm(klass, name=name, template=template)
                vm.features.update(dict.fromkeys(features, "1"))

    @classmethod
    def create_empty_store(cls, path, **properties):
        app = cls(path)
        vars(app).update(properties)
        return app

    async def setup_pools(self):
        pass

    async def add_pool(self, **options):
        assert options["driver"] == "file", options

    def add_new_vm(self, cls, *, name, template="-", **properties):
        vm = VM(self, cls, name=name, template=template, **properties)
        self.domains[name] = vm
        return vm

    def save(self):
        vms = self.domains.values()
        lines = ([vm.klass, vm.name, vm.template, *vm.features] for vm in vms)
        self.path.write_text("\n".join(map(" ".join, lines)))

    def close(self):
        self.domains.clear()
