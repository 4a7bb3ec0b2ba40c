"""What is run once: tests without VMs, and those that choose templates themselves."""

import asyncio
import time

import qubes.exc
import qubes.tests.extra
import qubes.vm.appvm
import qubes.vm.standalonevm
import qubes.vm.templatevm

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
        deadline = time.monotonic() + 300
        while not sleeper.done() and time.monotonic() < deadline:
            time.sleep(0.05)
        self.assertTrue(sleeper.done())

    def test_070_not_running(self):
        (vm,) = self.create_vms(["vm"])
        with self.assertRaises(qubes.exc.QubesVMNotStartedError):
            vm.run("true", wait=True)
        with self.assertRaises(qubes.exc.QubesVMNotStartedError):
            vm.shutdown(wait=True)


class TC_01_Copies(qubes.tests.extra.ExtraTestCase):
    """VMs that a test makes itself, from classes and names, and of other VMs."""

    def add(self, cls, name, **properties):
        return self.app.add_new_vm(
            cls, name=self.make_vm_name(name), label="green", **properties
        )

    def test_000_clone(self):
        """Of the VM that a test has, into one that it has from the app."""
        (source,) = self.create_vms(["source"])
        source.memory = 300
        source.start()
        self.assertEqual(source.run("echo kept > kept; sync", wait=True), 0)
        source.shutdown(wait=True)
        clone = self.add(qubes.vm.appvm.AppVM, "clone")
        self.assertEqual(clone.label.color, self.app.get_label("green").color)
        clone.clone_properties(source)
        self.assertEqual(clone.memory, 300)
        self.loop.run_until_complete(clone.clone_disk_files(source))
        self.loop.run_until_complete(clone.start())
        output, _ = self.loop.run_until_complete(clone.run_for_stdio("cat kept"))
        self.assertEqual(output, b"kept\n")
        self.loop.run_until_complete(clone.kill())
        self.loop.run_until_complete(clone.remove_from_disk())

    def test_010_wrapper_and_vm_are_one(self):
        first, second = self.create_vms(["first", "second"])
        inner = self.app.domains[first.name]
        self.assertIs(first._vm, inner)  # noqa: SLF001 - plugins use it
        self.assertEqual((first, inner), (inner, first))
        self.assertEqual({first: "found"}[inner], "found")
        self.assertIn(first, self.app.domains)
        self.assertNotEqual(second, inner)
        first.template_for_dispvms = True
        second.default_dispvm = first
        self.assertIs(self.app.domains[second].default_dispvm, inner)
        self.remove_vms((first, second))

    def test_020_templates(self):
        """An empty one, a copy of another, and a VM from the name of that."""
        empty = self.add("TemplateVM", "empty")
        self.loop.run_until_complete(empty.create_on_disk())
        copy = self.add(qubes.vm.templatevm.TemplateVM, "copy")
        self.loop.run_until_complete(copy.clone_disk_files(self.app.default_template))
        based = self.add("AppVM", "based", template=copy.name)
        self.assertEqual(based.template, copy)
        self.loop.run_until_complete(based.create_on_disk())
        self.assertEqual(based.volumes["root"].source, copy.volumes["root"])
        self.app.default_template = copy.name
        (vm,) = self.create_vms(["vm"])
        self.assertEqual(vm.template, copy)

    def test_030_standalone(self):
        vm = self.add(qubes.vm.standalonevm.StandaloneVM, "alone", virt_mode="hvm")
        self.assertEqual(vm.virt_mode, "hvm")
        self.loop.run_until_complete(vm.clone_disk_files(self.app.default_template))
        self.assertTrue(vm.volumes["root"].save_on_stop)
        with self.assertRaises(qubes.exc.QubesVMNotStartedError):
            self.loop.run_until_complete(vm.run_for_stdio("true"))

    def test_040_background_work_goes_on(self):
        """A call that a VM makes by itself ends while the test only sleeps."""
        vm, other = self.create_vms(["vm", "other"])
        self.qrexec_policy("qubes.VMShell", vm, other)
        vm.start()
        other.start()
        call = f"qrexec-client-vm {other.name} qubes.VMShell"
        self.assertIsNone(vm.run(f"echo 'echo done > done' | {call}"))
        deadline = time.monotonic() + 300
        while other.run("grep -q done done", wait=True) != 0:
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.2)


def list_tests():
    return (TC_00_System, TC_01_Copies, *core_suite.list_tests())
