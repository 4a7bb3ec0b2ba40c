"""A suite in the shape of the core's own: its base class, its classes per template."""

import sys

import qubes.tests


class VolumesMixin:
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
        pool = type(default)(
            name="test-pool", dir_path=f"{default.dir_path}-{self.make_vm_name('pool')}"
        )
        return self.loop.run_until_complete(self.app.add_pool(pool))

    def test_000_extra_volume(self):
        self.add_pool()
        size = 64 * 1024 * 1024
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


@qubes.tests.skipUnlessDom0
class TC_10_Names(qubes.tests.SystemTestCase):
    def test_000_templates(self):
        self.assertIn(self.app.default_template.name, qubes.tests.list_templates())
        self.assertTrue(self.make_vm_name("x").startswith(qubes.tests.VMPREFIX))


def list_tests():
    module = sys.modules[__name__]
    list(
        qubes.tests.create_testcases_for_templates(
            "TC_20_Volumes", VolumesMixin, qubes.tests.SystemTestCase, module=module
        )
    )
    templates = qubes.tests.list_templates()
    return [TC_10_Names, *(getattr(module, f"TC_20_Volumes_{t}") for t in templates)]
