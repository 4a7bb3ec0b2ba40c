"""A plugin of bad guests and bad names; most of its tests fail, each its own way."""

from __future__ import annotations

import contextlib
import resource
import time
from dataclasses import replace
from pathlib import Path

from qubes.tests.extra import ExtraTestCase

from qubes_itests.core.exc import QubesVMStartError
from qubes_itests.guest.image.cpio import Archive
from qubes_itests.guest.image.initramfs import build_initramfs
from qubes_itests.host.cache import Cache
from qubes_itests.host.filesystem import FilesystemType, LoopFilesystem
from qubes_itests.host.kernel import find_kernel
from qubes_itests.run.testbed import current
from qubes_storage.reflink import ReflinkPool

MIB = 1 << 20

#: Seconds that a start may take that ends for what the guest does.
PATIENCE = 300

INIT = """#!/busybox sh
b=/busybox
$b mkdir -p /dev; $b mount -t devtmpfs d /dev; $b mount -t sysfs s /sys
for m in $($b cat /modules); do $b insmod $m; done
port=$($b grep -l org.qubes_itests.agent /sys/class/virtio-ports/*/name)
port=/dev/$($b basename ${port%/name})
"""

#: Takes the port away from the agent. Nobody else opens it then: who did and wrote
#: garbage would be told apart from the agent or not, as the host happens to look.
UNBIND = """
cd /sys/bus/virtio/drivers/virtio_console
{
    sleep 0.5
    for device in virtio[0-9]*; do echo $device >unbind; done
} </dev/null >/dev/null 2>&1 &
"""


class TC_00_Guests(ExtraTestCase):  # noqa: N801 - as plugins name theirs
    def vm_with_init(self, script):
        """Return a VM whose init is a script in place of the agent."""
        directory = self.app.directory
        (directory / "init").write_text(INIT + script)
        busybox = Archive()
        busybox.file("busybox", Path("/bin/busybox").read_bytes(), 0o755)
        modules = find_kernel(Cache()).modules
        image = build_initramfs(directory / "init", modules) + busybox.to_bytes()
        (directory / "initramfs").write_bytes(image)
        self.app.kernels["bad"] = replace(
            self.app.kernels[self.template], initramfs=directory / "initramfs"
        )
        (vm,) = self.create_vms(["bad"])
        vm.kernel = "bad"
        vm.qrexec_timeout = PATIENCE
        return vm

    def test_silent(self):
        """Nothing but its deadline ends the start.

        A guest that has not come as far by then, as the machine is slow, gets more.
        """
        vm = self.vm_with_init("echo I say nothing >/dev/console; exec $b sleep 9000")
        console = vm.directory / "console.log"
        for seconds in 10, 20, 40, 80, 160, 320:
            vm.qrexec_timeout = seconds
            with self.assertRaisesRegex(QubesVMStartError, f"within {seconds} s") as it:
                vm.start()
            spoke = console.exists() and b"I say nothing" in console.read_bytes()
            if spoke and "reach its agent" in str(it.exception):
                break
        raise it.exception

    def test_dies(self):
        self.vm_with_init("echo my last words >/dev/console; exit 1").start()

    def test_garbage_at_once(self):
        self.vm_with_init("while :; do $b cat /dev/urandom; done >$port").start()

    def test_port_taken_away(self):
        """The other VM knows nothing of it."""
        vm, other = self.create_vms(["mute", "other"])
        vm.start()
        other.start()
        vm.run(UNBIND, user="root", wait=True)
        try:
            self.loop.run_until_complete(vm.run_for_stdio("sleep 9000"))
        finally:
            self.assertEqual(other.run("true", wait=True), 0)

    def test_flood_of_the_console(self):
        """Disk and memory stay bounded, and the guest goes on."""
        (vm,) = self.create_vms(["flood"])
        vm.start()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        vm.run("yes `seq 500` >/dev/console &", user="root", wait=True)
        log = vm.domain.console_log()
        deadline = time.monotonic() + PATIENCE
        while b"bytes dropped]" not in log.read_bytes():
            self.assertLess(time.monotonic(), deadline)
            self.assertEqual(vm.run("sleep 0.1", wait=True), 0)
        size = sum(path.stat().st_size for path in log.parent.glob("console*"))
        self.assertLess(size, 3 * MIB)
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        self.assertLess(used, 64 << 10)

    def test_full_pool(self):
        """A guest is told that it cannot write, and others go on; none can start."""
        other, writer, late = self.create_vms(["other", "writer", "late"])
        other.start()
        with self.small_pool() as directory, contextlib.ExitStack() as undo:
            undo.callback(self.remove_vms, [writer, late])
            self.move_private_volume(writer)
            writer.start()
            with contextlib.suppress(OSError), (directory / "x").open("wb", 0) as file:
                while True:
                    file.write(bytes(65536))
            write = "yes | dd bs=64k count=512 conv=fsync >/rw/x"
            self.assertNotEqual(writer.run(write, user="root", wait=True), 0)
            self.assertEqual(writer.run("true", wait=True), 0)
            self.assertEqual(other.run("true", wait=True), 0)
            self.move_private_volume(late)
            late.start()

    @contextlib.contextmanager
    def small_pool(self):
        place = current().parts.run_directory / "small"
        place.mkdir()
        small = LoopFilesystem(
            place / "i", place / "m", kind=FilesystemType.BTRFS, size=160 * MIB
        )
        with small:
            pool = ReflinkPool(name="small", dir_path=small.mount_point / "pool")
            self.loop.run_until_complete(self.app.add_pool(pool))
            try:
                yield small.mount_point
            finally:
                del self.app.pools["small"]

    def move_private_volume(self, vm):
        run = self.loop.run_until_complete
        run(vm.remove_from_disk())
        run(vm.create_on_disk(pools={"private": "small"}))


class TC_10_Names(ExtraTestCase):  # noqa: N801
    def test_slash(self):
        self.create_vms(["a/b"])

    def test_dots(self):
        self.app.add_new_vm("AppVM", name="..", label="red")

    def test_newline(self):
        self.create_vms(["a\nb"])

    def test_too_long(self):
        self.app.add_new_vm("AppVM", name="a" * 32, label="red")


class TC_20_Afterwards(ExtraTestCase):  # noqa: N801
    def test_goes_on(self):
        (vm,) = self.create_vms(["after"])
        vm.start()
        self.assertEqual(vm.run("exit 3", wait=True), 3)


def list_tests():
    return [TC_00_Guests, TC_10_Names, TC_20_Afterwards]
