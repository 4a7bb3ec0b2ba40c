"""A block device of one VM as the disk of another, by libvirt's calls."""

import asyncio
import contextlib
import subprocess
import unittest
import uuid

import libvirt
import qubesdb

import qubes

LIB = "/var/lib/qubes"
DISK = "<disk type='block' device='{}'><source dev='{}'/><target dev='{}'/>{}</disk>"
OF_BACK = "<backenddomain name='back'/>"
MAC = "00:16:3e:5e:6c:00"
INTERFACE = (
    f"<interface type='ethernet'><mac address='{MAC}'/><ip address='10.137.0.5'/>"
    f"{OF_BACK}<script path='vif-route-qubes'/></interface>"
)
FACTS = {
    "back": {"/qubes-netvm-gateway": "10.137.0.1"},
    "front": {"/qubes-ip": "10.137.0.5", "/qubes-gateway": "10.137.0.1"},
}


class TC_00_Devices(unittest.TestCase):
    def setUp(self):
        self.loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self.loop)
        self.undo = contextlib.ExitStack()
        self.connection = libvirt.open()
        self.undo.callback(asyncio.set_event_loop, None)
        self.undo.callback(self.loop.close)
        self.undo.callback(self.connection.close)
        with open(f"{LIB}/disk.img", "wb") as file:
            file.truncate(8 << 20)
        self.back, self.front = self.define("back"), self.define("front")
        both = (qubes.start(self.back), qubes.start(self.front))
        self.loop.run_until_complete(self.gather(both))

    async def gather(self, both):
        await asyncio.gather(*both)

    def tearDown(self):
        self.undo.close()

    def define(self, name):
        root, private = f"{LIB}/{name}-root.img", f"{LIB}/{name}-private.img"
        template = f"{LIB}/vm-templates/tiny/root.img"
        subprocess.run(["cp", "--reflink=always", template, root], check=True)
        with open(private, "wb") as file:
            file.truncate(64 << 20)
        values = {"root": root, "private": private, "kernel": "tiny"}
        xml = qubes.XML.format(name=name, uuid=uuid.uuid4(), **values)
        domain = self.connection.defineXML(xml)
        self.undo.callback(domain.undefine)
        self.undo.callback(lambda: domain.isActive() and domain.destroy())
        return domain

    def in_guest(self, name, command):
        words = ("-d", name, f"root:{command}")
        return self.loop.run_until_complete(qubes.run_program("qrexec_client", *words))

    def test_000_a_device_of_another_vm(self):
        self.back.attachDevice(DISK.format("disk", f"{LIB}/disk.img", "xvdi", ""))
        written = DISK.format("disk", "/dev/xvdi", "xvdj", OF_BACK)
        self.front.attachDevice(written)
        read = DISK.format("cdrom", "/dev/xvdi", "xvdk", OF_BACK)
        self.front.attachDevice(read)
        self.assertEqual(self.front.XMLDesc().count('<backenddomain name="back"'), 2)
        status, said, _ = self.in_guest(
            "front",
            "echo said | dd of=/dev/xvdj conv=fsync 2>/dev/null; head -c 5 /dev/xvdk;"
            " cat /sys/class/block/$(readlink /dev/xvdk)/size;"
            " dd if=/dev/zero of=/dev/xvdk count=1 2>/dev/null || echo refused",
        )
        self.assertEqual((status, said), (0, b"said\n16384\nrefused\n"))
        with open(f"{LIB}/disk.img", "rb") as file:
            self.assertEqual(file.read(5), b"said\n")
        self.front.detachDevice(written)
        self.assertEqual(self.front.XMLDesc().count('<backenddomain name="back"'), 1)
        status, _, _ = self.in_guest("front", "! test -e /dev/xvdj")
        self.assertEqual(status, 0)
        self.not_to_be_had()
        self.back.resume()
        self.an_interface()
        # when it has gone, its devices give errors; they are pulled out as ever
        self.back.destroy()
        status, _, _ = self.in_guest("front", "! dd if=/dev/xvdk skip=9000 count=1")
        self.assertEqual(status, 0)
        for each in (read, INTERFACE):
            self.front.detachDevice(each)
        self.assertNotIn("backenddomain", self.front.XMLDesc())

    def an_interface(self):
        """To a net VM that answers; it is there again after it was detached."""
        with self.assertRaisesRegex(libvirt.libvirtError, "provides no network"):
            self.front.attachDevice(INTERFACE)
        for name, entries in FACTS.items():
            database = qubesdb.QubesDB(name)
            for path, value in entries.items():
                database.write(path, value)
        gone = "! test -e /sys/class/net/eth0"
        for _ in range(2):
            self.front.detachDevice(INTERFACE)
            self.assertEqual(self.in_guest("front", gone)[0], 0)
            self.front.attachDevice(INTERFACE)
            self.assertIn(MAC, self.front.XMLDesc())
            status, said, _ = self.in_guest(
                "front",
                "cat /sys/class/net/eth0/address; ping -c 1 -W 9 10.137.0.1 >/dev/null",
            )
            self.assertEqual((status, said), (0, f"{MAC}\n".encode()))
        with self.assertRaisesRegex(libvirt.libvirtError, "already"):
            self.front.attachDevice(INTERFACE)

    def not_to_be_had(self):
        before = self.front.XMLDesc()
        for backend, path, told in (
            ("nobody", "/dev/xvdb", "there is no such VM"),
            ("back", "/dev/none", ""),
        ):
            of = f"<backenddomain name='{backend}'/>"
            with self.assertRaisesRegex(libvirt.libvirtError, told):
                self.front.attachDevice(DISK.format("disk", path, "xvdj", of))
            self.assertEqual(self.front.XMLDesc(), before)
        self.back.suspend()
        with self.assertRaisesRegex(libvirt.libvirtError, "it is paused") as caught:
            self.front.attachDevice(DISK.format("disk", "/dev/xvdb", "xvdj", OF_BACK))
        code = caught.exception.get_error_code()
        self.assertEqual(code, libvirt.VIR_ERR_OPERATION_INVALID)
