"""The base of tests that apps bring."""

import asyncio
import unittest

import libvirt

import qubes


class ExtraTestCase(unittest.TestCase):
    template = None
    #: What says that it is this one.
    base = "of the checkout"

    def setUp(self):
        self.loop = asyncio.new_event_loop()
        self.app = qubes.Qubes("/var/lib/qubes/qubes.xml")

    def tearDown(self):
        for name in self.app.domains:
            if name.startswith("test-inst-"):
                domain = libvirt.open().lookupByName(name)
                if domain.isActive():
                    domain.destroy()
        self.loop.close()

    def start_vm(self, name):
        vm = self.app.add_new_vm(
            "AppVM", name=f"test-inst-{name}", template=self.template
        )
        self.loop.run_until_complete(vm.create_on_disk())
        self.loop.run_until_complete(vm.start())
        return vm

    def wait_until_it_ends(self, vm):
        domain = libvirt.open().lookupByName(vm.name)
        deadline = self.loop.time() + 600
        while domain.isActive() and self.loop.time() < deadline:
            self.loop.run_until_complete(asyncio.sleep(0.05))

    def run_in(self, vm, command, user="user"):
        words = ("-d", vm.name, f"{user}:{command}")
        done = qubes.run_program("qrexec_client", *words)
        return self.loop.run_until_complete(done)
