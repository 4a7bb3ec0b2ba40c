"""What is run once: tests without VMs, and those that choose templates themselves."""

import asyncio
import time

import qubes.exc
import qubes.tests.extra
import qubes.vm.appvm

from . import core_suite


class TC_00_System(qubes.tests.extra.ExtraTestCase):
    def test_000_app(self):
        self.assertIn("dom0", self.app.domains)
        self.assertEqual(self.app.domains["dom0"].name, "dom0")
        self.assertIn(self.app.default_template, list(self.app.domains))
        dispvm_base = self.app.default_dispvm
        self.assertEqual(dispvm_base.name, self.make_vm_name("dvm"))
        self.assertTrue(dispvm_base.template_for_dispvms)

    def test_010_create_and_remove(self):
        first, second = self.create_vms(["first", "second"])
        self.assertEqual(first.name, self.make_vm_name("first"))
        self.assertEqual(str(first), first.name)
        self.assertEqual(first, self.app.domains[first.name])
        self.assertEqual(hash(first), hash(self.app.domains[first]))
        self.assertNotEqual(first, second)
        self.assertFalse(first.is_running())
        self.remove_vms((first, second))
        self.assertNotIn(self.make_vm_name("first"), self.app.domains)

    def test_020_add_new_vm(self):
        vm = self.app.add_new_vm(
            qubes.vm.appvm.AppVM,
            name=self.make_vm_name("added"),
            label="blue",
            template=self.app.default_template,
        )
        self.assertIsInstance(vm, qubes.vm.appvm.AppVM)
        self.assertEqual(vm.label.name, "blue")
        self.loop.run_until_complete(vm.create_on_disk())
        self.app.save()
        self.loop.run_until_complete(vm.remove_from_disk())

    def test_030_properties(self):
        (vm,) = self.create_vms(["vm"])
        vm.memory = 300
        self.assertEqual(self.app.domains[vm.name].memory, 300)
        vm.features["service.smoke"] = True
        self.assertEqual(self.app.domains[vm.name].features["service.smoke"], "1")
        vm.tags.add("smoke")
        self.assertIn("smoke", self.app.domains[vm.name].tags)

    def test_040_bad_names(self):
        for name in ("a/b", "..", "a\nb", "x" * 32, ""):
            with self.subTest(name=name), self.assertRaises(qubes.exc.QubesException):
                self.app.add_new_vm(
                    "AppVM",
                    name=name,
                    label="red",
                    template=self.app.default_template,
                )

    def test_050_loop(self):
        self.assertIs(asyncio.get_event_loop(), self.loop)
        results = self.loop.run_until_complete(
            asyncio.gather(asyncio.sleep(0, "one"), asyncio.sleep(0, "two"))
        )
        self.assertEqual(results, ["one", "two"])

    def test_060_loop_goes_on_while_the_test_blocks(self):
        async def start():
            return asyncio.ensure_future(asyncio.sleep(0.05, "awake"))

        sleeper = self.loop.run_until_complete(start())
        deadline = time.monotonic() + 10
        while not sleeper.done() and time.monotonic() < deadline:
            time.sleep(0.05)
        self.assertTrue(sleeper.done())

    def test_070_not_running(self):
        (vm,) = self.create_vms(["vm"])
        with self.assertRaises(qubes.exc.QubesVMNotStartedError):
            vm.run("true", wait=True)
        with self.assertRaises(qubes.exc.QubesVMNotStartedError):
            vm.shutdown(wait=True)


def list_tests():
    return (TC_00_System, *core_suite.list_tests())
