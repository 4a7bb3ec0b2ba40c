"""VM `vault` has an ssh-agent, VM `work` uses it through the service test.SshAgent."""

import struct

import qubes.tests.extra

SERVICE = "test.SshAgent"
KEY = "alice@vault"
#: Exit status of ssh-add when there is no agent to talk to.
NO_AGENT = 2


class TC_00_SplitSsh(qubes.tests.extra.ExtraTestCase):
    def setUp(self):
        super().setUp()
        self.vault, self.work = self.create_vms(["vault", "work"])
        self.vault.start()
        self.work.start()
        self.must(
            self.vault,
            "mkdir -m 700 ~/.ssh &&"
            f" ssh-keygen -q -t ed25519 -N '' -C {KEY} -f ~/.ssh/id_ed25519"
            " && test-ssh-agent start",
        )
        listen = f"test-ssh-listen {self.vault.name}"
        self.socket = self.must(self.work, listen).decode().strip()
        self.qrexec_policy(SERVICE, self.work.name, self.vault.name)

    def must(self, vm, command, data=b""):
        """Return what a command that must succeed writes to stdout."""
        process = vm.run(command, passio_popen=True, passio_stderr=True)
        stdout, stderr = process.communicate(data)
        self.assertEqual(process.returncode, 0, stderr)
        return stdout

    def start(self, command):
        """Begin with a command in `work` that finds the agent."""
        return self.work.run(
            f"export SSH_AUTH_SOCK={self.socket}; {command}",
            passio_popen=True,
            passio_stderr=True,
        )

    def ask(self, command, data=b""):
        """Return (exit status, output, error output) of such a command."""
        process = self.start(command)
        stdout, stderr = process.communicate(data)
        return process.returncode, stdout.decode(), stderr.decode()

    def sign(self, letter):
        """Have `work` sign a letter: files `letter`, `letter.sig`, `signers`."""
        public = self.must(self.vault, "cat .ssh/id_ed25519.pub")
        self.must(self.work, "cat >key.pub", public)
        self.must(self.work, "cat >letter", letter)
        self.must(self.work, "cat >signers", f"{KEY} {public.decode()}".encode())
        return self.ask("ssh-keygen -Y sign -n letter -f key.pub letter")

    def verify(self, letter):
        """Return (exit status, output, error output) of what looks at the signature."""
        check = f"ssh-keygen -Y verify -f signers -I {KEY} -n letter -s letter.sig"
        return self.ask(check, letter)

    def test_000_list_keys(self):
        fingerprint = self.must(self.vault, "ssh-keygen -lf .ssh/id_ed25519.pub")
        self.assertEqual(self.ask("ssh-add -l"), (0, fingerprint.decode(), ""))
        # there is no key in `work`, and no agent but that of the vault
        self.assertEqual(self.work.run("ssh-add -l", wait=True), NO_AGENT)

    def test_010_sign_and_verify(self):
        status, _, stderr = self.sign(b"I owe you 10.\n")
        self.assertEqual(status, 0, stderr)
        status, stdout, stderr = self.verify(b"I owe you 10.\n")
        self.assertEqual(status, 0, stderr)
        self.assertIn(f'Good "letter" signature for {KEY}', stdout)
        status, stdout, _ = self.verify(b"I owe you 99.\n")
        self.assertEqual((status, stdout), (255, "Could not verify signature.\n"))

    def test_020_denied(self):
        with self.qrexec_policy(SERVICE, self.work.name, self.vault.name, allow=False):
            status, _, stderr = self.ask("ssh-add -l")
            self.assertEqual(status, 1)
            self.assertIn("communication with agent failed", stderr)
            status, _, _ = self.sign(b"please\n")
            self.assertNotEqual(status, 0)
            log = self.must(self.work, f"cat {self.socket}.log")
            self.assertIn(b"denied by policy", log)
        self.assertEqual(self.ask("ssh-add -l")[0], 0)

    def test_030_several_connections_at_once(self):
        # one that says nothing keeps nobody from being served
        idle = self.start("socat - UNIX-CONNECT:$SSH_AUTH_SOCK")
        processes = [self.start("ssh-add -l") for _ in range(5)]
        for process in processes:
            stdout, stderr = process.communicate()
            self.assertIn(KEY.encode(), stdout, stderr)
            self.assertEqual(process.returncode, 0)
        self.assertIsNone(idle.returncode)
        idle.communicate()
        self.assertEqual(idle.returncode, 0)

    def test_040_agent_is_restarted(self):
        self.must(self.vault, "test-ssh-agent stop")
        status, _, stderr = self.ask("ssh-add -l")
        self.assertEqual(status, 1)
        self.assertIn("communication with agent failed", stderr)
        self.must(self.vault, "test-ssh-agent start")
        # the same socket, for programs that were started before
        self.assertEqual(self.ask("ssh-add -l")[0], 0)
        self.assertEqual(self.sign(b"a letter\n")[0], 0)

    def test_050_only_lists_and_signs(self):
        self.must(self.work, "ssh-keygen -q -t ed25519 -N '' -f own")
        for command in ("ssh-add own", "ssh-add -D", "ssh-add -x </dev/null"):
            with self.subTest(command):
                self.assertNotEqual(self.ask(command)[0], 0)
        keys = self.must(
            self.vault, "SSH_AUTH_SOCK=$XDG_RUNTIME_DIR/test-ssh-agent ssh-add -l"
        )
        self.assertEqual(keys.count(b"\n"), 1)
        self.assertIn(KEY.encode(), keys)

    def test_060_hostile_messages(self):
        call = f"qrexec-client-vm {self.vault.name} {SERVICE}"
        for name, data in {
            "too long": struct.pack(">I", 1 << 31) + b"x" * 1000,
            "empty": struct.pack(">I", 0),
            "cut off": struct.pack(">IB", 100, 11),
        }.items():
            with self.subTest(name):
                status, stdout, _ = self.ask(call, data)
                self.assertEqual((status, stdout), (1, ""))
        self.assertEqual(self.ask("ssh-add -l")[0], 0)


def list_tests():
    return (TC_00_SplitSsh,)
