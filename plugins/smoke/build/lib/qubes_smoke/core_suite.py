"""A suite in the shape of the core's own: its base class, its classes per template."""

import asyncio
import contextlib
import sys

import qubes.exc
import qubes.tests
import qubes.utils

MIB = 1024 * 1024


class CoreMixin:
    def setUp(self):
        super().setUp()
        self.init_default_template(self.template)
        self.vm = self.app.add_new_vm(
            "AppVM",
            name=self.make_vm_name("vm"),
            label="red",
            template=self.app.default_template,
        )
        self.loop.run_until_complete(self.vm.create_on_disk())

    def output(self, command):
        stdout, _ = self.loop.run_until_complete(
            self.vm.run_for_stdio(command, user="root")
        )
        return stdout.decode().strip()

    def add_pool(self):
        default = self.app.pools[str(self.app.default_pool)]
        pool = self.loop.run_until_complete(
            self.app.add_pool(
                name="test-pool",
                driver="file-reflink",
                dir_path=f"{default.dir_path}-{self.make_vm_name('pool')}",
            )
        )
        self.assertIs(self.app.pools["test-pool"], pool)
        return pool


class VolumesMixin(CoreMixin):
    def test_000_extra_volume(self):
        self.add_pool()
        size = 64 * MIB
        volume = self.vm.storage.init_volume(
            "extra",
            {"pool": "test-pool", "size": size, "save_on_stop": True, "rw": True},
        )
        self.assertIs(self.vm.volumes["extra"], volume)
        self.loop.run_until_complete(volume.create())

        self.loop.run_until_complete(self.start_vm(self.vm))
        self.assertEqual(self.output("blockdev --getsize64 /dev/xvde"), str(size))
        self.output("echo kept | dd of=/dev/xvde bs=512 conv=sync,fsync")
        self.shutdown_and_wait(self.vm)
        self.assertFalse(self.vm.is_running())

        self.loop.run_until_complete(self.start_vm(self.vm))
        self.assertEqual(self.output("head -c 4 /dev/xvde"), "kept")
        self.shutdown_and_wait(self.vm)
        self.remove_vms([self.vm])
        self.loop.run_until_complete(self.app.remove_pool("test-pool"))
        self.assertNotIn("test-pool", self.app.pools)


class SnapshotMixin(CoreMixin):
    """Two VMs, a pool, and a tearDown that leaves the disks to the harness."""

    def setUp(self):
        super().setUp()
        self.old_default_pool = self.app.default_pool
        self.reader = self.app.add_new_vm(
            "AppVM", name=self.make_vm_name("reader"), label="red"
        )
        self.loop.run_until_complete(self.reader.create_on_disk())
        self.pool = self.add_pool()
        self.app.save()

    def tearDown(self):
        for vm in (self.vm, self.reader):
            with contextlib.suppress(qubes.exc.QubesException):
                self.loop.run_until_complete(vm.kill())
        del self.app.domains[self.reader]
        del self.app.domains[self.vm]
        del self.vm, self.reader
        self.app.default_pool = self.old_default_pool
        self.loop.run_until_complete(self.app.remove_pool(self.pool.name))
        del self.pool
        super().tearDown()

    async def made_volume(self, vm, **more):
        config = {"pool": self.pool.name, "size": 32 * MIB, "rw": True, **more}
        volume = vm.storage.init_volume("testvol", config)
        await qubes.utils.coro_maybe(volume.create())
        return volume

    async def read(self):
        stdout, _ = await self.reader.run_for_stdio(
            "head -c 4 /dev/xvde | tr '\\0' -", user="root", stderr=None
        )
        return stdout

    def test_000_snapshot(self):
        """What one writes, the other has after both have restarted."""
        self.loop.run_until_complete(self.snapshot())

    async def snapshot(self):
        origin = await self.made_volume(self.vm, save_on_stop=True)
        await self.made_volume(self.reader, snap_on_start=True, source=origin.vid)
        await asyncio.gather(self.vm.start(), self.reader.start())
        await asyncio.wait(
            [
                asyncio.create_task(self.wait_for_session(self.vm)),
                asyncio.create_task(self.wait_for_session(self.reader)),
            ]
        )
        await self.vm.run_for_stdio("echo kept > /dev/xvde; sync", user="root")
        await self.vm.shutdown(wait=True)
        self.assertEqual(await self.read(), b"----")
        await self.reader.shutdown(wait=True)
        await self.start_vm(self.reader)
        self.assertEqual(await self.read(), b"kept")


class ServicesMixin(CoreMixin):
    """Services and rules, as suites of the core write them."""

    def test_000_call(self):
        self.loop.run_until_complete(self.start_vm(self.vm))
        self.create_remote_file(
            self.vm, "/etc/qubes-rpc/test.Who", '#!/bin/sh\nprintf "%s %s" $(id -un) $1'
        )
        call = "/usr/lib/qubes/qrexec-client-vm @default test.Who+word; echo $?"
        target = f"target={self.vm.name}"
        caller = self.app.add_new_vm(
            "AppVM", name=self.make_vm_name("caller"), label="red"
        )
        self.loop.run_until_complete(caller.create_on_disk())
        self.loop.run_until_complete(caller.start())
        for action, expected in (
            (f"allow {target} user=root", b"root word0\n"),
            (f"allow {target} user=user", b"user word0\n"),
            ("deny", b"126\n"),
        ):
            with self.qrexec_policy("test.Who", caller, "@default", action=action):
                stdout, _ = self.loop.run_until_complete(
                    caller.run_for_stdio(call, stderr=None)
                )
            self.assertEqual(stdout, expected)
        self.remove_vms([self.vm, caller])


@qubes.tests.skipUnlessDom0
class TC_10_Names(qubes.tests.SystemTestCase):
    def test_000_templates(self):
        self.assertIn(self.app.default_template.name, qubes.tests.list_templates())
        self.assertTrue(self.make_vm_name("x").startswith(qubes.tests.VMPREFIX))


SUITES = {
    "TC_20_Volumes": VolumesMixin,
    "TC_30_Snapshot": SnapshotMixin,
    "TC_40_Services": ServicesMixin,
}


def create_testcases_for_templates():
    for name, mixin in SUITES.items():
        yield from qubes.tests.create_testcases_for_templates(
            name,
            mixin,
            qubes.tests.SystemTestCase,
            module=sys.modules[__name__],
        )


def list_tests():
    module = sys.modules[__name__]
    names = [name.rpartition(".")[2] for name in create_testcases_for_templates()]
    return [TC_10_Names, *(getattr(module, name) for name in names)]


qubes.tests.maybe_create_testcases_on_import(create_testcases_for_templates)
