"""Tests of an app: each asks for something that its core or its template has."""

from pathlib import Path

import libvirt
from qubes.tests.extra import ExtraTestCase


class TC_00_Guest(ExtraTestCase):
    def test_000_service(self):
        vm = self.start_vm("work")
        done = self.run_in(vm, "/etc/qubes-rpc/my.Hello")
        self.assertEqual(done, (0, b"hello\n", b""))
        # tests that ask for a network are skipped where it does not run
        self.assertTrue(libvirt.open().lookupByName("sys-net").isActive())

    def test_001_panic(self):
        vm = self.start_vm("mad")
        self.run_in(vm, "echo c > /proc/sysrq-trigger", user="root")
        self.wait_until_it_ends(vm)


class TC_10_Dom0(ExtraTestCase):
    def test_000_base(self):
        self.assertEqual(self.base, "of the checkout")

    def test_001_policy(self):
        places = (
            "/etc/qubes/policy.d/30-my-app.policy",
            "/etc/qubes-rpc/policy/my.Hello",
        )
        for place in map(Path, places):
            self.assertIn("allow", place.read_text())


def for_template():
    return [TC_00_Guest]


def once():
    return [TC_10_Dom0]
