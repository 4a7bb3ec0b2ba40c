"""A service in one VM, called from another: policy, argument, local command."""

import qubes.tests.extra

SERVICE = """#!/bin/sh
echo "from $QREXEC_REMOTE_DOMAIN argument ${1-none}"
cat
exit ${1:-0}
"""


class TC_00_SplitEcho(qubes.tests.extra.ExtraTestCase):
    def setUp(self):
        super().setUp()
        self.backend, self.frontend = self.create_vms(["backend", "frontend"])
        self.backend.start()
        self.frontend.start()
        self.install("test.Echo", SERVICE)

    def install(self, service, text):
        path = f"/etc/qubes-rpc/{service}"
        process = self.backend.run(
            f"cat > {path} && chmod +x {path}", user="root", passio_popen=True
        )
        process.communicate(text.encode())
        self.assertEqual(process.returncode, 0)

    def call(self, words, data=b"", user=None):
        """Return (exit code, stdout) of a call."""
        process = self.frontend.run(
            f"qrexec-client-vm {words}", user=user, passio_popen=True
        )
        stdout, _ = process.communicate(data)
        return process.returncode, stdout.decode()

    def test_000_allow(self):
        self.qrexec_policy("test.Echo", self.frontend.name, self.backend.name)
        greeting = f"from {self.frontend.name} argument none\n"
        for user in ("user", "root"):
            self.assertEqual(
                self.call(f"{self.backend.name} test.Echo", b"hello\n", user=user),
                (0, greeting + "hello\n"),
            )
        # the other place where callers look for the client
        command = f"/usr/lib/qubes/qrexec-client-vm {self.backend.name} test.Echo"
        self.assertEqual(self.frontend.run(command, wait=True), 0)

    def test_010_deny(self):
        call = f"{self.backend.name} test.Echo"
        self.assertEqual(self.call(call, b"hello\n"), (126, ""))
        with self.qrexec_policy("test.Echo", self.frontend.name, self.backend.name):
            self.assertEqual(self.call(call)[0], 0)
        self.assertEqual(self.call(call)[0], 126)
        self.qrexec_policy("test.Echo", self.frontend.name, self.backend.name)
        self.qrexec_policy(
            "test.Echo", self.frontend.name, self.backend.name, allow=False
        )
        self.assertEqual(self.call(call)[0], 126)
        # the other way round was never allowed
        reverse = f"qrexec-client-vm {self.frontend.name} test.Echo"
        self.assertEqual(self.backend.run(reverse, wait=True), 126)

    def test_020_argument_and_exit_code(self):
        self.qrexec_policy("test.Echo", self.frontend.name, self.backend.name)
        status, stdout = self.call(f"{self.backend.name} test.Echo+7")
        self.assertEqual(status, 7)
        self.assertEqual(stdout, f"from {self.frontend.name} argument 7\n")

    def test_030_local_command(self):
        """The command talks to the service; its old stdio is in SAVED_FD_0 and _1."""
        self.install("test.Line", '#!/bin/sh\nread line; echo "got $line"; exit 3\n')
        self.qrexec_policy("test.Line", self.frontend.name, self.backend.name)
        script = "read x <&$SAVED_FD_0; echo $x; read y; echo local $y >&$SAVED_FD_1"
        self.assertEqual(
            self.call(f"{self.backend.name} test.Line sh -c '{script}'", b"question\n"),
            (3, "local got question\n"),
        )

    def test_040_nothing_there(self):
        self.qrexec_policy("test.Missing", self.frontend.name, self.backend.name)
        self.assertEqual(self.call(f"{self.backend.name} test.Missing")[0], 127)
        self.qrexec_policy("test.Echo", "@anyvm", "@anyvm")
        self.assertEqual(self.call("no-such-vm test.Echo")[0], 126)

    def test_050_target(self):
        self.qrexec_policy(
            "test.Echo", self.frontend.name, "@default", target=self.backend.name
        )
        status, stdout = self.call("@default test.Echo", b"redirected\n")
        self.assertEqual(status, 0)
        self.assertIn("redirected", stdout)


def list_tests():
    return (TC_00_SplitEcho,)
