"""The life of one VM, with the calls of core-admin in their order."""

import asyncio
import gc
import os
import socket
import subprocess
import threading
import unittest
import uuid

import libvirt
import libvirtaio
import qubesdb
import xen.lowlevel.xc
import xen.lowlevel.xs

import qubes
import qubes.config

UUID = uuid.UUID("2f6b1e2a-9d4e-4a58-8a55-0c6c6d6d7a01")
EVENTS = {2: "started", 3: "suspended", 4: "resumed", 5: "stopped"}


class Qubesd(threading.Thread):
    """Answers one call."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def __enter__(self):
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind("/run/qubesd.misc.sock")
        self.server.listen()
        self.start()
        return self

    def __exit__(self, *_exc):
        self.server.shutdown(socket.SHUT_RDWR)
        self.join()
        self.server.close()
        os.unlink("/run/qubesd.misc.sock")

    def run(self):
        connection, _ = self.server.accept()
        with connection:
            self.got = b"".join(iter(lambda: connection.recv(65536), b""))
            connection.sendall(self.answer)


class LifeTestCase(unittest.TestCase):
    def setUp(self):
        self.loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self.loop)
        libvirtaio.virEventRegisterAsyncIOImpl(self.loop)
        self.root = "/var/lib/qubes/root.img"
        private = "/var/lib/qubes/private.img"
        template = "/var/lib/qubes/vm-templates/tiny/root.img"
        subprocess.run(["cp", "--reflink=always", template, self.root], check=True)
        with open(private, "wb") as file:
            file.truncate(64 << 20)
        self.connection = libvirt.open("xen:///")
        self.events = []
        self.connection.domainEventRegisterAny(
            None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self.note, None
        )
        values = {"root": self.root, "private": private, "kernel": "tiny"}
        self.xml = qubes.XML.format(name="work", uuid=UUID, **values)
        self.domain = self.connection.defineXML(self.xml)

    def tearDown(self):
        if self.domain.isActive():
            self.domain.destroy()
        self.domain.undefine()
        self.connection.close()
        self.loop.close()
        asyncio.set_event_loop(None)
        # as core-admin's tests have it
        gc.collect()
        kinds = (libvirt.virConnect, libvirt.virDomain)
        del self.connection, self.domain
        self.assertEqual([x for x in gc.get_objects() if isinstance(x, kinds)], [])

    def note(self, connection, domain, event, detail, opaque):
        self.events.append((domain.name(), EVENTS[event]))

    def program(self, name, *words, stdin=b"in\n"):
        done = self.loop.run_until_complete(
            qubes.run_program(name, *words, stdin=stdin)
        )
        self.assertEqual(done[0], 0, done)
        return done[1]


class TC_00_Life(LifeTestCase):
    def test_000_life(self):
        database = self.loop.run_until_complete(qubes.start(self.domain))
        self.assertTrue(os.path.exists("/var/run/qubes/qrexec.work"))
        # so little is given to a start that is to fail
        self.assertEqual(self.wait_for_agent("0.1"), (3, b"no agent within 0.1 s\n"))
        os.truncate("/var/lib/qubes/private.img", 96 << 20)
        service = "root:QUBESRPC qubes.ResizeDisk dom0"
        self.program("qrexec_client", "-d", "work", service, stdin=b"private")
        size = self.program("qrexec_client", "-d", "work", "root:df -m /rw | tail -n 1")
        self.assertGreater(int(size.split()[1]), 64)
        said = self.program("qrexec_client", "-d", "work", "root:cat; hostname; mount")
        self.assertRegex(said, rb"(?s)\Ain\nwork\n.*/dev/xvdb on /rw type ext4")
        service = "cd /etc/qubes-rpc; echo tr i o > test.Echo; chmod +x test.Echo"
        call = "qrexec-client-vm work"
        said = self.program(
            "qrexec_client",
            *("-d", "work"),
            f"root:{service}; {call} test.Echo; {call} test.Other 2>&1 || echo $?",
        )
        self.assertEqual(said, b"on\nqrexec-client-vm: Request refused\n126\n")
        # more than one read of a stream gives, both ways
        notify = "qrexec-client-vm dom0 qubes.NotifyUpdates 2>&1; echo $?"
        with Qubesd(b"0\0said") as qubesd:
            said = self.in_guest(f"head -c 200000 /dev/zero | {notify}")
        header = b"qubes.NotifyUpdates work name dom0\0"
        self.assertEqual((qubesd.got, said), (header + bytes(200000), b"0\n"))
        with Qubesd(b"2\0PermissionDenied\0"):
            self.assertEqual(self.in_guest(notify), b"1\n")
        self.shared(database, notify)
        self.services_of_dom0()
        self.loop.run_until_complete(self.closed_output())
        info = xen.lowlevel.xc.xc().domain_getinfo(self.domain.ID(), 1)
        self.assertEqual(info[0]["mem_kb"], 200 << 10)
        started = xen.lowlevel.xs.xs().read("", f"/vm/{UUID}/start_time")
        self.assertGreater(float(started), 0)
        database.watch("/later")
        self.program("xl", "shutdown", "-F", "work")
        # libvirt tells that it is off before it has told of its end
        names = ["started", "resumed", "stopped"]
        deadline = self.loop.time() + 600
        while len(self.events) < len(names) and self.loop.time() < deadline:
            self.loop.run_until_complete(asyncio.sleep(0.05))
        self.assertEqual(self.events, [("work", name) for name in names])
        self.assertEqual((self.domain.isActive(), self.domain.ID()), (0, -1))
        self.assertFalse(os.path.exists("/var/run/qubes/qrexec.work"))
        with self.assertRaises(qubesdb.DisconnectedError):
            database.read_watch()
        with self.assertRaises(qubesdb.Error):
            qubesdb.QubesDB("work")

    def in_guest(self, command):
        return self.program("qrexec_client", "-d", "work", f"root:{command}")

    def shared(self, database, notify):
        """See what the guest writes in dom0, and the other way round."""
        database.write("/later", "value")
        database.write("/gone", "value")
        database.write("/lines", "a\nb")
        self.assertEqual(database.list("/l"), ["/later", "/lines"])
        # the last of them: the guest changes what it has
        self.in_guest("until qubesdb-read /lines; do sleep 0.1; done")
        database.watch("/features-request/")
        change = "qubesdb-write /features-request/a 1 /later other && qubesdb-rm /gone"
        with Qubesd(b"0\0"):
            self.in_guest(f"{change} && {notify}")
        self.assertEqual(database.read("/features-request/a"), b"1")
        self.assertEqual(database.read("/later"), b"other")
        self.assertEqual(database.read("/lines"), b"a\nb")
        self.assertIsNone(database.read("/gone"))
        self.assertEqual(database.read_watch(), "/features-request/a")
        database.unwatch("/features-request/")
        database.rm("/features-request/")
        with Qubesd(b"0\0"):
            self.in_guest(notify)
        self.assertEqual(database.list("/features-request/"), [])

    def services_of_dom0(self):
        script = "echo $QREXEC_REMOTE_DOMAIN $1; cat; exit 3"
        path = "/etc/qubes-rpc/test.Dom0"
        with open(path, "w") as file:
            file.write(f"#!/bin/sh\n{script}\n")
        os.chmod(path, 0o755)  # noqa: S103
        call = "echo in | qrexec-client-vm dom0"
        said = self.in_guest(f"{call} test.Dom0+a; echo $?; {call} test.None; echo $?")
        os.unlink(path)
        self.assertEqual(said, b"work a\nin\n3\n127\n")
        with self.assertLogs("qubes_itests.dom0") as logs:
            self.in_guest("qrexec-client-vm dom0 admin.vm.List || true")
        self.assertIn("/run/qubesd.sock", logs.output[0])

    async def closed_output(self):
        """Read to the end of an output that is closed before the command ends."""
        process = await asyncio.create_subprocess_exec(
            qubes.config.system_path["qrexec_client_path"],
            *("-d", "work", "-p", "before", "root:head -c 6; exec >&-; cat"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.assertEqual(await process.stdout.read(), b"before")
        self.assertIsNone(process.returncode)
        process.stdin.close()
        await process.wait()

    def test_003_leaves_something_behind(self):
        name = "/var/tmp/test-left-by-a-core"  # noqa: S108
        self.assertFalse(os.path.exists(name))
        with open(name, "w"):
            pass

    def test_001_killed_while_it_starts(self):
        self.domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
        self.program("qubesdb_daemon", str(self.domain.ID()), "work")
        self.domain.resume()
        self.domain.destroy()
        with self.assertRaises(libvirt.libvirtError) as caught:
            self.domain.destroy()
        code = caught.exception.get_error_code()
        self.assertEqual(code, libvirt.VIR_ERR_OPERATION_INVALID)

    def test_004_resumed_without_a_database(self):
        self.domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
        with self.assertLogs("qubes_itests.dom0") as logs:
            self.domain.resume()
            while self.domain.isActive():
                self.loop.run_until_complete(asyncio.sleep(0.05))
        self.assertIn("no qubesdb-daemon was started for it", logs.output[0])

    def wait_for_agent(self, limit):
        words = ("-q", "-u", str(UUID), "--", str(self.domain.ID()), "work", "user")
        done = subprocess.run(
            [qubes.config.system_path["qrexec_daemon_path"], *words],
            env={**os.environ, "QREXEC_STARTUP_TIMEOUT": limit},
            capture_output=True,
            check=False,
        )
        return done.returncode, done.stderr

    def test_006_an_agent_that_is_not_there_in_time(self):
        self.domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
        self.program("qubesdb_daemon", str(self.domain.ID()), "work")
        self.domain.resume()
        self.assertEqual(self.wait_for_agent("0"), (3, b"no agent within 0 s\n"))

    def test_007_its_memory_is_balanced(self):
        xml = self.xml.replace('memory unit="MiB">200', 'memory unit="MiB">1200')
        xml = xml.replace(
            'currentMemory unit="MiB">200', 'currentMemory unit="MiB">400'
        )
        self.domain = self.connection.defineXML(xml)
        with socket.socket(socket.AF_UNIX) as start:
            start.connect("/var/run/qubes/qmemman.sock")
            start.sendall(b"%d\n" % (400 << 20))
            self.assertEqual(start.recv(16), b"OK\n")
            self.domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
        self.program("qubesdb_daemon", str(self.domain.ID()), "work")
        self.domain.resume()
        place = f"/local/domain/{self.domain.ID()}/memory"
        store, control = xen.lowlevel.xs.xs(), xen.lowlevel.xc.xc()
        held = [control.domain_getinfo(self.domain.ID(), 1)[0]["mem_kb"]]
        self.assertEqual(held, [400 << 10])
        # the policy of this core is twice what it uses, and that is below 200 MiB
        deadline = self.loop.time() + 600
        while held[-1] == 400 << 10 or held[-1] != self.domain.memoryStats()["actual"]:
            self.assertLess(self.loop.time(), deadline, held)
            self.loop.run_until_complete(asyncio.sleep(0.05))
            held.append(control.domain_getinfo(self.domain.ID(), 1)[0]["mem_kb"])
        self.assertTrue(store.read("", f"{place}/meminfo").isdigit())
        self.assertNotEqual(int(store.read("", f"{place}/target")), 400 << 10)

    def test_005_leaves_loop_devices_behind(self):
        for place in ("/tmp", "/var/tmp"):  # noqa: S108
            name = f"{place}/test-loop-of-a-core"
            with open(name, "wb") as file:
                file.truncate(1 << 20)
            subprocess.run(["losetup", "--find", name], check=True)
            os.unlink(name)

    def test_002_a_disk_that_is_missing(self):
        os.unlink(self.root)
        with self.assertRaisesRegex(
            libvirt.libvirtError, "xvda: there is no .*root.img"
        ):
            self.domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
        self.assertFalse(self.domain.isActive())
        with self.assertRaises(libvirt.libvirtError) as caught:
            self.connection.lookupByUUID(bytes(15) + b"\7")
        code = caught.exception.get_error_code()
        self.assertEqual(code, libvirt.VIR_ERR_NO_DOMAIN)
