"""dom0 around a core: its daemon of libvirt, its systemd, its programs."""

import grp
import os
import pwd
import re
import subprocess
import unittest

import libvirt
import qubesdb
from qubes import config
from qubes.storage import file
from qubes.vm.appvm import AppVM

DOM0 = bytes(16)
UNIT = "qubes-vm@work.service"


class TC_00_Basic(unittest.TestCase):
    def test_141_a_daemon_that_is_restarted(self):
        events = []
        first, closed = libvirt.open(), libvirt.open()
        closed.close()
        kind = libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE
        number = first.domainEventRegisterAny(None, kind, events.append, None)
        domain = first.lookupByUUID(DOM0)
        subprocess.run(["systemctl", "restart", "virtxend"], check=True)
        self.assertEqual((first.isAlive(), domain.connect().isAlive()), (0, 0))
        for call in (first.getHostname, domain.isActive):
            with self.assertRaises(libvirt.libvirtError) as caught:
                call()
            self.assertEqual(
                caught.exception.get_error_code(), libvirt.VIR_ERR_INTERNAL_ERROR
            )
        first.domainEventDeregisterAny(number)
        first.close()
        second = libvirt.open()
        self.assertEqual(second.getHostname(), "dom0")
        self.assertTrue(second.lookupByUUID(domain.UUID()).isActive())
        second.close()

    def test_130_units_that_start_with_dom0(self):
        link = f"/etc/systemd/system/multi-user.target.wants/{UNIT}"
        subprocess.run(["sudo", "systemctl", "enable", UNIT], check=True)
        # what it leads to is the checkout's
        with open(link) as unit:
            self.assertIn("a unit of the core", unit.read())
        subprocess.run(["sudo", "systemctl", "disable", UNIT], check=True)
        self.assertFalse(os.path.lexists(link))
        # a unit may be named by its path: that is no link of ours
        path = "/var/tmp/qubes-vm@work.service"  # noqa: S108
        with open(path, "w"):
            pass
        for words in ("stop sshd", f"disable {path}"):
            command = ["systemctl", *words.split()]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            told = f"systemctl: there is no systemd here for '{words}'\n"
            self.assertEqual((done.returncode, done.stderr), (2, told))
        self.assertTrue(os.path.exists(path))

    def test_207_what_backups_need(self):
        """The home of the user is that of the sandbox; keys are made in a moment."""
        user = grp.getgrnam("qubes").gr_mem[0]
        home = pwd.getpwnam(user).pw_dir
        self.assertEqual((user, home), ("user", os.environ["HOME"]))
        # programs run as the user may read and write what is root's
        for words in (["runuser", "-u", user, "--"], ["sudo", "-E", "-u", user]):
            words += ["sh", "-c", "id -u; cd /root && pwd"]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            self.assertEqual(done.stdout, "0\n/root\n")
        self.assertEqual(os.listdir(home), [])
        self.assertTrue(os.path.samefile(os.path.expanduser("~root"), home))
        self.assertEqual(os.stat(home).st_dev, os.stat("/var/lib/qubes").st_dev)
        # by its name it knows what it is to do
        service = "admin.vm.volume.ImportWithSize"
        words = [f"/etc/qubes-rpc/{service}", "root"]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        self.assertEqual(done.stdout, f"{service} root\n")
        plain, secret = "/var/tmp/plain", "/var/tmp/secret"  # noqa: S108
        with open(plain, "w") as file:
            file.write("said")
        words = ["--passphrase", "env:WORD"]
        variables = {**os.environ, "WORD": "word"}
        command = ["scrypt", "enc", *words, plain, secret]
        subprocess.run(command, env=variables, check=True)
        command = ["scrypt", "dec", *words, secret]
        done = subprocess.run(command, env=variables, capture_output=True, check=True)
        self.assertEqual(done.stdout, b"said")
        info = subprocess.run(
            ["scrypt", "info", secret], capture_output=True, check=True
        )
        said = info.stdout + info.stderr
        self.assertLess(int(re.search(rb"N = (\d+)", said)[1]), 1 << 18)

    def test_208_programs_called_by_their_paths(self):
        program = "/usr/lib/qubes/preload-dispvm"
        done = subprocess.run([program], capture_output=True, text=True, check=True)
        self.assertEqual(
            done.stdout, f"a program of the core, for root, in {program}\n"
        )
        self.assertFalse(os.path.exists("/usr/lib/qubes/Makefile"))
        client = ["/usr/lib/qubes/qrexec-client", "-d", "nobody", "user:true"]
        done = subprocess.run(client, capture_output=True, text=True, check=False)
        self.assertIn("qrexec-client: there is no domain 'nobody'", done.stderr)
        # what the machine has is there still, by its own paths
        self.assertEqual(os.path.realpath("/usr/lib/systemd"), "/usr/lib/systemd")
        unpacker = ["/usr/libexec/qubes/qfile-dom0-unpacker", "0", "/var/tmp"]  # noqa: S108
        done = subprocess.run(
            unpacker, input=bytes(32), capture_output=True, check=True
        )
        self.assertEqual(done.stdout[:4], bytes(4))

    def test_209_volumes_are_as_large_as_in_qubes_os(self):
        self.assertEqual(config.defaults["root_img_size"], 10 << 30)
        self.assertEqual(AppVM.default_volume_config["private"]["size"], 2 << 30)

    def test_206_linear_devices_of_device_mapper(self):
        """Of a part of a loop device, and told of in qubesdb while not mounted."""
        image, place, device = "/var/tmp/m.img", "/var/tmp/m", "/dev/mapper/test-m"  # noqa: S108
        with open(image, "wb") as new:
            new.truncate(8 << 20)
        script = (
            "loop=$(losetup --find --show $0); number=$(cat /sys/block/${loop#/dev/}/dev);"
            ' dmsetup create test-m --table "0 8192 linear $number 2048"; udevadm settle'
        )
        subprocess.run(["sudo", "sh", "-ec", script, image], check=True)
        database = qubesdb.QubesDB("dom0")
        found = database.multiread("/qubes-block-devices/dm-0/")
        values = {"desc": b"test-m", "mode": b"w", "parent": b"", "size": b"4194304"}
        self.assertEqual(
            found, {f"/qubes-block-devices/dm-0/{k}": v for k, v in values.items()}
        )
        subprocess.run(["mkfs.ext4", "-q", "-L", "here", device], check=True)
        with open(image, "rb") as file:
            file.seek((1 << 20) + 1144)
            self.assertEqual(file.read(4), b"here")
        os.mkdir(place)
        for words, count in ((["mount", device, place], 0), (["umount", place], 4)):
            subprocess.run(words, check=True)
            subprocess.run(["udevadm", "settle"], check=True)
            found = database.list("/qubes-block-devices/dm-0/")
            self.assertEqual(len(found), count)
        for status in (0, 2):
            done = subprocess.run(["dmsetup", "remove", "test-m"], check=False)
            self.assertEqual(done.returncode, status)
        self.assertEqual(database.list("/qubes-block-devices/"), [])
        self.assertFalse(os.path.lexists(device))
        for table in ("0 8 linear 7:99999 0", "0 8 crypt 7:0 0", ""):
            words = ["dmsetup", "create", "test-m", "--table", table]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            self.assertIn(done.returncode, (1, 2))
            self.assertRegex(done.stderr, "dmsetup: (expected a name|.*7:99999)")

    def test_204_devices_of_the_driver_file(self):
        image, changes = "/var/tmp/a.img", "/var/tmp/a-cow.img"  # noqa: S108
        for name in (image, changes):
            with open(name, "wb") as new:
                new.truncate(1 << 20)
        subprocess.run([file.CREATE_SCRIPT, "origin-a", image, changes], check=True)
        device = "/dev/mapper/origin-a"
        self.assertEqual(os.path.getsize(device), 1 << 20)
        subprocess.run([file.DESTROY_SCRIPT, device], check=True)
        self.assertFalse(os.path.lexists(device))
        done = subprocess.run(
            [file.DESTROY_SCRIPT, device], capture_output=True, check=False
        )
        self.assertEqual(done.returncode, 1)
        self.assertIn(b"No such file or directory", done.stderr)

    def test_205_tools_of_the_client(self):
        done = subprocess.run(["qvm-hello", "work"], capture_output=True, check=True)
        self.assertEqual(done.stdout, b"qvm-hello work\n")
