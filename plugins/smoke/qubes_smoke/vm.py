"""What a VM on the template must be able to do."""

import asyncio
import hashlib
import os
import signal
import subprocess
import time

import qubes.tests.extra

BIG = 16 * 1024 * 1024


class SmokeTestCase(qubes.tests.extra.ExtraTestCase):
    def setUp(self):
        super().setUp()
        (self.vm,) = self.create_vms(["vm"])
        self.vm.start()

    def output(self, command, **options):
        process = self.vm.run(command, passio_popen=True, **options)
        stdout, _ = process.communicate()
        self.assertEqual(process.returncode, 0, command)
        return stdout.decode().strip()

    def install(self, path, text, mode="0755"):
        process = self.vm.run(
            f"mkdir -p $(dirname {path}) && cat > {path} && chmod {mode} {path}",
            user="root",
            passio_popen=True,
            passio_stderr=True,
        )
        _, stderr = process.communicate(text.encode())
        self.assertEqual(process.returncode, 0, stderr)

    def wait_for(self, command):
        deadline = time.monotonic() + 300
        while self.vm.run(command, wait=True) != 0:
            self.assertLess(time.monotonic(), deadline, command)
            time.sleep(0.05)


class TC_00_Commands(SmokeTestCase):
    def test_000_forms_of_run(self):
        self.assertTrue(self.vm.is_running())
        self.assertEqual(self.vm.run("true", wait=True), 0)
        self.assertIsNone(self.vm.run("echo done > /tmp/forgotten"))
        process = self.vm.run("cat; echo more", passio_popen=True, gui=False)
        self.assertEqual(process.communicate(b"some\n"), (b"some\nmore\n", None))
        process = self.vm.run(
            "echo out; echo err >&2; exit 3", passio_popen=True, passio_stderr=True
        )
        self.assertEqual(process.communicate(), (b"out\n", b"err\n"))
        self.assertEqual(process.returncode, 3)
        # without input, stdin is at its end
        self.assertEqual(self.vm.run("cat", wait=True), 0)
        self.wait_for("grep -q done /tmp/forgotten")

    def test_010_exit_codes(self):
        for status in (0, 1, 2, 125, 126, 127, 255):
            with self.subTest(status=status):
                self.assertEqual(self.vm.run(f"exit {status}", wait=True), status)
        self.assertEqual(self.vm.run("/no/such/command", wait=True), 127)
        self.assertEqual(self.vm.run("/etc/passwd", wait=True), 126)
        # a shell adds 128 to the signal, other ways to run a command negate it
        for number in (signal.SIGTERM, signal.SIGKILL):
            with self.subTest(signal=number):
                status = self.vm.run(f"kill -{int(number)} $$", wait=True)
                self.assertIn(status, (-number, 128 + number))

    def test_020_users(self):
        self.assertEqual(self.output("id -un"), "user")
        self.assertEqual(self.output("id -un", user="root"), "root")
        self.assertEqual(self.output("id -un", user="user"), "user")
        self.assertEqual(self.output("echo $HOME"), "/home/user")
        self.assertEqual(self.output("pwd"), "/home/user")
        self.assertEqual(self.output("echo $HOME", user="root"), "/root")
        self.assertIn("qubes", self.output("id -Gn").split())
        self.assertEqual(self.vm.run("touch /root/x", wait=True), 1)
        self.assertNotEqual(self.vm.run("true", user="nobody-here", wait=True), 0)

    def test_030_process(self):
        process = self.vm.run("cat", passio_popen=True)
        self.assertIsNone(process.returncode)
        process.stdin.write(b"one\n")
        process.stdin.flush()
        read = self.loop.run_until_complete
        self.assertEqual(read(process.stdout.readline()), b"one\n")
        process.stdin.write(b"two\n")
        read(process.stdin.drain())
        self.assertEqual(read(process.stdout.readline()), b"two\n")
        self.assertIsNone(process.returncode)
        process.stdin.close()
        self.assertEqual(process.wait(), 0)
        self.assertEqual(process.returncode, 0)

    def test_031_streams_of_either_kind(self):
        """A stream of the core has no flush: who tries that first must be told."""
        pipe = subprocess.PIPE
        inner = self.app.domains[self.vm].run("cat", stdin=pipe, stdout=pipe)
        for process in (
            self.vm.run("cat", passio_popen=True, gui=False),
            self.loop.run_until_complete(inner),
        ):
            process.stdin.write(b"line\n")
            try:
                process.stdin.flush()
            except AttributeError:
                self.loop.run_until_complete(process.stdin.drain())
            line = self.loop.run_until_complete(process.stdout.readline())
            self.assertEqual(line, b"line\n")
            process.stdin.close()
            ended = process.wait()
            if asyncio.iscoroutine(ended):
                ended = self.loop.run_until_complete(ended)
            self.assertEqual(ended, 0)

    def test_040_signals(self):
        for send, number in (("terminate", signal.SIGTERM), ("kill", signal.SIGKILL)):
            with self.subTest(send=send):
                process = self.vm.run("exec sleep 1000", passio_popen=True)
                self.assertIsNone(process.returncode)
                getattr(process, send)()
                self.assertIn(process.wait(), (-number, 128 + number))

    def test_050_big_streams(self):
        data = os.urandom(BIG)
        process = self.vm.run("cat", passio_popen=True)
        stdout, _ = process.communicate(data)
        self.assertEqual(
            hashlib.sha256(stdout).hexdigest(), hashlib.sha256(data).hexdigest()
        )
        process = self.vm.run("wc -c", passio_popen=True)
        self.assertEqual(process.communicate(data)[0].strip(), str(BIG).encode())

    def test_060_many_at_once(self):
        processes = [
            self.vm.run(f"read x; echo {n} $x", passio_popen=True) for n in range(20)
        ]
        for number, process in enumerate(processes):
            stdout, _ = process.communicate(b"of 20\n")
            self.assertEqual(stdout, f"{number} of 20\n".encode())


class TC_10_Services(SmokeTestCase):
    def test_000_forms_of_run_service(self):
        self.install("/etc/qubes-rpc/test.Copy", "#!/bin/sh\ncat > /tmp/copy\n")
        for data in ("text\n", b"text\n"):
            self.assertEqual(self.vm.run_service("test.Copy", input=data), 0)
            self.assertEqual(self.output("cat /tmp/copy"), "text")
        self.assertEqual(self.vm.run_service("test.Copy"), 0)
        self.assertEqual(self.output("cat /tmp/copy"), "")
        self.install(
            "/etc/qubes-rpc/test.Echo",
            '#!/bin/sh\ncat; echo "$1"; echo err >&2; exit 4\n',
        )
        self.assertEqual(self.vm.run_service("test.Echo", wait=True), 4)
        process = self.vm.run_service(
            "test.Echo+word", passio_popen=True, passio_stderr=True
        )
        self.assertEqual(process.communicate(b"in\n"), (b"in\nword\n", b"err\n"))
        self.assertEqual(process.returncode, 4)

    def test_010_who_and_what(self):
        self.install(
            "/etc/qubes-rpc/test.Who",
            '#!/bin/sh\necho "$(id -un) $QREXEC_REMOTE_DOMAIN'
            ' $QREXEC_SERVICE_FULL_NAME $QREXEC_SERVICE_ARGUMENT"\n',
        )
        for user in ("user", "root"):
            process = self.vm.run_service("test.Who+a", user=user, passio_popen=True)
            stdout, _ = process.communicate()
            self.assertEqual(stdout.decode().split(), [user, "dom0", "test.Who+a", "a"])

    def test_020_missing_service(self):
        self.assertEqual(self.vm.run_service("test.Missing"), 127)
        self.install("/etc/qubes-rpc/test.One+only", "#!/bin/sh\nexit 5\n")
        self.assertEqual(self.vm.run_service("test.One+only"), 5)
        self.assertEqual(self.vm.run_service("test.One+other"), 127)

    def test_030_session(self):
        coroutine = self.wait_for_session(self.vm)
        self.assertTrue(asyncio.iscoroutine(coroutine))
        self.loop.run_until_complete(coroutine)
        status = self.vm.run_service("qubes.WaitForSession", wait=True, input="user")
        self.assertEqual(status, 0)

    def test_040_features(self):
        """They are files before the session begins, in the VM's next start."""
        self.vm.shutdown(wait=True)
        self.vm.features["service.smoke-on"] = True
        self.vm.features["service.smoke-off"] = False
        self.vm.start()
        listed = self.output("cd /run/qubes-service; echo smoke*")
        self.assertEqual(listed, "smoke-on")
        self.assertEqual(self.vm.features["service.smoke-off"], "")


class TC_20_Disks(SmokeTestCase):
    def test_000_what_lasts(self):
        """The private volume outlives a restart, changes of the root do not."""
        self.assertEqual(self.vm.run("echo home > $HOME/kept", wait=True), 0)
        self.assertEqual(
            self.vm.run(
                "echo rw > /rw/kept; echo x > /etc/lost", user="root", wait=True
            ),
            0,
        )
        self.assertEqual(self.vm.run("test -e /etc/lost", wait=True), 0)
        self.vm.shutdown(wait=True)
        self.assertFalse(self.vm.is_running())
        self.vm.start()
        self.assertEqual(self.output("cat $HOME/kept /rw/kept"), "home\nrw")
        self.assertEqual(self.vm.run("test -e /etc/lost", wait=True), 1)

    def test_010_names(self):
        self.assertEqual(self.output("hostname"), self.vm.name)
        self.assertEqual(self.output("qubesdb-read /name"), self.vm.name)
        for disk in ("xvda", "xvdb", "xvdc"):
            self.assertEqual(self.vm.run(f"test -b /dev/{disk}", wait=True), 0, disk)


class TC_30_Disposable(SmokeTestCase):
    def call(self, target):
        return self.vm.run(
            f"echo hostname | qrexec-client-vm {target} qubes.VMShell",
            passio_popen=True,
            passio_stderr=True,
        )

    def disposables(self):
        return [vm.name for vm in self.app.domains if vm.klass == "DispVM"]

    def wait_gone(self):
        deadline = time.monotonic() + 300
        while self.disposables():
            self.assertLess(time.monotonic(), deadline, "it is still there")
            time.sleep(0.05)

    def test_000_call(self):
        for target in ("@dispvm", f"@dispvm:{self.app.default_dispvm.name}"):
            with self.qrexec_policy("qubes.VMShell", self.vm, target):
                process = self.call(target)
                stdout, stderr = process.communicate()
                self.assertEqual(process.returncode, 0, stderr)
                self.assertRegex(stdout.decode(), "^disp[0-9]+\n$")
                self.wait_gone()
            with self.qrexec_policy("qubes.VMShell", self.vm, target, allow=False):
                self.assertEqual(self.call(target).wait(), 126)

    def test_010_no_default(self):
        self.app.default_dispvm = None
        with self.qrexec_policy("qubes.VMShell", self.vm, "@dispvm"):
            self.assertEqual(self.call("@dispvm").wait(), 126)
        self.assertEqual(self.disposables(), [])

    def test_020_by_hand(self):
        dispvm_class = type(
            self.app.add_new_vm("DispVM", name=self.make_vm_name("disp"), label="red")
        )
        dispvm = self.loop.run_until_complete(
            dispvm_class.from_appvm(self.app.default_dispvm)
        )
        self.assertRegex(dispvm.name, "^disp[0-9]+$")
        self.loop.run_until_complete(dispvm.start())
        output, _ = self.loop.run_until_complete(dispvm.run_for_stdio("hostname"))
        self.assertEqual(output.decode().strip(), dispvm.name)
        self.loop.run_until_complete(dispvm.cleanup())
        self.assertNotIn(dispvm.name, self.app.domains)


def list_tests():
    return (TC_00_Commands, TC_10_Services, TC_20_Disks, TC_30_Disposable)
