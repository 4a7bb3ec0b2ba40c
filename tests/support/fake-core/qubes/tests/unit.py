"""A unit suite."""

import asyncio
import os
import subprocess
import tempfile
import unittest

import libvirt
import qubes
import qubes.config
import qubesdb
import xen.lowlevel.xs
from qubes.storage import reflink


class TC_00_Platform(unittest.TestCase):
    def test_000_names_what_is_missing(self):
        for thing, name in (
            (libvirt, "openAuth"),
            (libvirt.open(), "migrate"),
            (qubesdb, "Watcher"),
            (xen.lowlevel.xs.xs(), "transaction_start"),
        ):
            with self.assertRaisesRegex(AttributeError, name):
                getattr(thing, name)

    def test_001_paths_are_those_of_qubes_os(self):
        path = qubes.config.system_path["qrexec_client_path"]
        self.assertEqual(path, "/usr/bin/qrexec-client")

    def test_003_sh_becomes_the_command(self):
        shown = subprocess.check_output(["sh", "-c", "readlink /proc/$$/exe"])
        self.assertTrue(shown.endswith(b"/readlink\n"), shown)

    def test_006_programs_are_those_of_the_system(self):
        path = os.environ["PATH"].split(":")
        self.assertTrue(path[0].endswith("/dom0/bin"), path)
        self.assertEqual(path[1:3], ["/usr/sbin", "/usr/bin"])

    def test_004_templates_have_told_of_their_services(self):
        (first, *_) = qubes.Qubes("/var/lib/qubes/qubes.xml").domains.values()
        told = {"supported-rpc.qubes.VMShell", "supported-rpc.qubes.WaitForSession"}
        self.assertLessEqual(told, first.features.keys())

    def test_005_what_comes_first_is_waited_for_in_both_ways(self):
        """As in Python 3.13: either is a way to get the tasks as they end."""

        async def each():
            event = asyncio.Event()
            tasks = [asyncio.create_task(event.wait()), asyncio.create_task(no_wait())]
            ended = []
            async for task in asyncio.as_completed(tasks):
                ended.append(tasks.index(task))
                event.set()
            return ended, [await one for one in asyncio.as_completed([no_wait()])]

        async def no_wait():
            return 3

        self.assertEqual(asyncio.run(each()), ([1, 0], [3]))

    def test_007_files_of_the_checkout(self):
        self.assertTrue(os.path.isfile("templates/libvirt/xen.xml"))

    def test_008_a_vm_of_which_a_test_says_that_it_runs(self):
        database = qubesdb.QubesDB("never-started")
        database.write("/name", "never-started")
        self.assertEqual(database.read("/name"), b"never-started")
        database.close()

    def _test_copy_file(self):
        with tempfile.TemporaryDirectory(dir="/var/tmp") as place:
            source, copy = f"{place}/source", f"{place}/copy"
            with open(source, "wb") as file:
                file.write(b"data")
            reflink._copy_file(source, copy)
            times = [os.stat(path).st_mtime_ns for path in (source, copy)]
        self.assertLess(*times)

    def test_009_a_copy_has_another_time_than_its_source(self):
        """Though the kernel's clock for files may stand still for some ms."""
        for _ in range(20):
            self._test_copy_file()
        # in no other test, nor in this one any more
        self.assertEqual(reflink._copy_file.__module__, reflink.__name__)
        self.assertFalse(hasattr(reflink._copy_file, "__wrapped__"))

    @unittest.skip("as it is")
    def test_002_skipped(self):
        pass
