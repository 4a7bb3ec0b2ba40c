"""A service in one VM, called from another: policy, argument, local command."""

import hashlib
import os

import qubes.tests.extra

MIB = 1024 * 1024

SERVICE = """#!/bin/sh
echo "from $QREXEC_REMOTE_DOMAIN argument ${1-none}"
cat
exit ${1:-0}
"""


#: Prints the types of its stdin and stdout, as the kernel lists sockets.
STDIO = r"""#!/bin/sh
for fd in 0 1; do
    inode=$(readlink /proc/$$/fd/$fd | sed -n 's/^socket:.\([0-9]*\).$/\1/p')
    awk -v inode="$inode" '$7 == inode { print $5 }' /proc/net/unix
done
"""

#: How many calls follow each other, and how many MiB go through one.
CALLS = 100
BIG = 32


class EchoTestCase(qubes.tests.extra.ExtraTestCase):
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


class TC_00_SplitEcho(EchoTestCase):
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
        for target in ("@default", "@dispvm", "dom0"):
            self.assertEqual(self.call(f"{target} test.Echo", b"hello\n"), (126, ""))
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

    def test_060_stdio_of_a_service(self):
        """Both ends are stream sockets, so that a service may shut one down."""
        self.install("test.Stdio", STDIO)
        self.qrexec_policy("test.Stdio", self.frontend.name, self.backend.name)
        status, stdout = self.call(f"{self.backend.name} test.Stdio")
        self.assertEqual((status, stdout.split()), (0, ["0001", "0001"]))

    def test_070_end_of_input_is_not_the_end(self):
        """Each direction ends by itself."""
        self.install("test.Late", "#!/bin/sh\necho first; exec 1>&2; wc -c >/tmp/got\n")
        self.install("test.Count", "#!/bin/sh\nwc -c\n")
        self.qrexec_policy("*", self.frontend.name, self.backend.name)
        call = f"{self.backend.name} test.Late"
        self.assertEqual(self.call(call, bytes(MIB)), (0, "first\n"))
        got = self.backend.run("grep -qx 1048576 /tmp/got", wait=True)
        self.assertEqual(got, 0)
        call = f"{self.backend.name} test.Count"
        status, stdout = self.call(call, bytes(MIB))
        self.assertEqual((status, stdout.strip()), (0, str(MIB)))


class TC_10_Load(EchoTestCase):
    def test_000_calls_in_a_row(self):
        """Each has its own answer, and what it used is free afterwards."""
        self.install(
            "test.Number", '#!/bin/sh\nread x; echo "$1 $x"; exit $(($1 % 7))\n'
        )
        self.qrexec_policy("test.Number", self.frontend.name, self.backend.name)
        call = f"qrexec-client-vm {self.backend.name} test.Number+$n; echo $?"
        process = self.frontend.run(
            f"for n in $(seq {CALLS}); do echo in$n | {call}; done", passio_popen=True
        )
        stdout, _ = process.communicate()
        expected = [f"{n} in{n}\n{n % 7}\n" for n in range(1, CALLS + 1)]
        self.assertEqual(stdout.decode(), "".join(expected))

    def test_010_big(self):
        """In and out at once, both through the call, and nothing is changed."""
        self.qrexec_policy("test.Echo", self.frontend.name, self.backend.name)
        data = os.urandom(MIB * BIG)
        process = self.frontend.run(
            f"qrexec-client-vm {self.backend.name} test.Echo", passio_popen=True
        )
        stdout, _ = process.communicate(data)
        self.assertEqual(process.returncode, 0)
        _, _, echo = stdout.partition(b"\n")
        self.assertEqual(len(echo), len(data))
        self.assertEqual(digest(echo), digest(data))


def digest(data):
    return hashlib.sha256(data).hexdigest()


def list_tests():
    return (TC_00_SplitEcho, TC_10_Load)
