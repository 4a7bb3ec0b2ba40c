"""VM `vault` has a secret key, VM `work` uses it through the service test.Gpg."""

import struct

import qubes.tests.extra

NAME = "alice@vault.example"
SERVICE = "test.Gpg"
MAGIC = b"TGP1"
MIB = 1 << 20

#: What would write, read or send something else than what is asked for.
FORBIDDEN = ("--output=loot", "--export-secret-keys", "--homedir=/tmp")


def request(*words, data=b""):
    """Return what test-gpg would send, if it let everything pass."""
    packed = b"".join(word.encode() + b"\0" for word in words)
    return MAGIC + struct.pack(">II", len(packed), 0) + packed + data


class TC_00_SplitGpg(qubes.tests.extra.ExtraTestCase):
    def setUp(self):
        super().setUp()
        self.vault, self.work = self.create_vms(["vault", "work"])
        self.vault.start()
        self.work.start()
        self.make_key()
        self.qrexec_policy(SERVICE, self.work.name, self.vault.name)

    def make_key(self):
        """Make a key that signs, with a subkey that decrypts."""
        generate = (
            "gpg --batch --quiet --passphrase '' --pinentry-mode loopback"
            f" --quick-generate-key {NAME} future-default default never"
        )
        self.assertEqual(self.vault.run(generate, wait=True), 0)

    def start(self, command):
        """Begin with a command in `work`."""
        return self.work.run(
            f"export TEST_GPG_VAULT={self.vault.name}; {command}",
            passio_popen=True,
            passio_stderr=True,
        )

    def ask(self, command, data=b""):
        """Return (exit status, stdout, stderr) of a command in `work`."""
        process = self.start(command)
        stdout, stderr = process.communicate(data)
        return process.returncode, stdout, stderr.decode()

    def must(self, command, data=b""):
        """Return what a command in `work` that must succeed writes to stdout."""
        status, stdout, stderr = self.ask(command, data)
        self.assertEqual(status, 0, stderr)
        return stdout

    def test_000_sign(self):
        signed = self.must("test-gpg --clear-sign", b"I owe you nothing.\n")
        self.assertIn(b"I owe you nothing.", signed)
        status, _, stderr = self.ask("test-gpg --verify", signed)
        self.assertEqual(status, 0, stderr)
        self.assertIn(f'Good signature from "{NAME}"', stderr)

    def test_010_detached_signature(self):
        self.must("cat >letter", b"a letter\n")
        armored = self.must("test-gpg -ba -u alice letter | tee letter.asc")
        self.assertTrue(armored.startswith(b"-----BEGIN PGP SIGNATURE-----"))
        self.must("test-gpg --verify letter.asc letter")
        # what it was made for may come by stdin
        self.must("test-gpg --verify letter.asc -", b"a letter\n")

    def test_020_bad_signature(self):
        signed = self.must("test-gpg --clear-sign", b"I owe you 10.\n")
        forged = signed.replace(b"you 10", b"you 99")
        status, stdout, stderr = self.ask("test-gpg --status-fd=1 --verify", forged)
        self.assertEqual(status, 1)
        self.assertIn(b"[GNUPG:] BADSIG ", stdout)
        self.assertIn("BAD signature", stderr)

    def test_030_encrypt_and_decrypt(self):
        secret = self.must(f"test-gpg -ea -r {NAME}", b"meet me at noon\n")
        self.assertNotIn(b"noon", secret)
        self.assertEqual(self.must("test-gpg -d", secret), b"meet me at noon\n")

    def test_040_big_file(self):
        self.must(
            f"head -c {3 * MIB} /dev/urandom >big"
            f" && test-gpg -e --compress-algo=none -r {NAME} big >big.gpg"
            " && ! cmp -s big big.gpg && test-gpg -d big.gpg | cmp - big"
        )

    def test_050_client_forbids(self):
        for option in FORBIDDEN:
            with self.subTest(option):
                status, stdout, stderr = self.ask(f"test-gpg {option} -k")
                self.assertEqual((status, stdout), (2, b""))
                self.assertIn(option.partition("=")[0], stderr)

    def test_060_service_forbids(self):
        """A caller who leaves test-gpg aside gets no further."""
        requests = {
            word: request(word, "--sign", data=b"text") for word in FORBIDDEN
        } | {
            "a file of the vault": request("--encrypt", "/etc/passwd"),
            "a value for a command": request("--sign=loot"),
            "no end": request("--list-keys")[:-3],
            "too much": MAGIC + struct.pack(">II", 1 << 31, 0) + b"x" * 100,
        }
        call = f"qrexec-client-vm {self.vault.name} {SERVICE}"
        for name, data in requests.items():
            with self.subTest(name):
                status, stdout, _ = self.ask(call, data)
                self.assertEqual(status, 2)
                self.assertEqual(stdout[:1], b"\2", "all of the answer is on stderr")
                self.assertIn(b"test.Gpg: ", stdout)
        self.assertNotEqual(self.vault.run("ls -d loot", wait=True), 0)
        # the service goes on
        self.must("test-gpg -k")

    def test_070_two_calls_in_parallel(self):
        first, second = (self.start("test-gpg --clear-sign") for _ in range(2))
        # the one that came last is served while the first waits for its input
        stdout, _ = second.communicate(b"second\n")
        self.assertIn(b"second", stdout)
        self.assertIsNone(first.returncode)
        stdout, _ = first.communicate(b"first\n")
        self.assertIn(b"first", stdout)
        self.assertEqual((first.returncode, second.returncode), (0, 0))

    def test_080_denied_without_policy(self):
        with self.qrexec_policy(SERVICE, self.work.name, self.vault.name, allow=False):
            status, stdout, _ = self.ask("test-gpg --clear-sign", b"please\n")
            self.assertEqual((status, stdout), (126, b""))
        self.must("test-gpg --clear-sign", b"please\n")
        # nobody has allowed the other direction
        back = f"TEST_GPG_VAULT={self.work.name} test-gpg -k"
        self.assertEqual(self.vault.run(back, wait=True), 126)

    def test_090_secret_key_is_in_the_vault_only(self):
        listed = self.must("test-gpg -K --with-colons").decode()
        self.assertIn(NAME, listed)
        self.assertTrue(listed.startswith("sec:"), listed)
        self.must("test-gpg -a --export | gpg --batch --quiet --import")
        self.assertIn(NAME.encode(), self.must("gpg --list-keys"))
        self.assertEqual(self.must("gpg --list-secret-keys"), b"")

    def test_100_streams_are_kept_apart(self):
        signed = self.must("test-gpg --sign", b"the text\n")
        status, stdout, stderr = self.ask("test-gpg --status-fd 5 -d 5>status", signed)
        self.assertEqual((status, stdout), (0, b"the text\n"))
        self.assertIn("Good signature", stderr)
        self.assertNotIn("[GNUPG:]", stderr)
        self.assertIn(b"[GNUPG:] GOODSIG ", self.must("cat status"))

    def test_110_exit_status_and_messages(self):
        for command, expected, message in (
            ("test-gpg -d", 2, "no valid OpenPGP data found"),
            ("test-gpg -e -r nobody@example", 2, "nobody@example"),
            ("test-gpg --sign missing", 2, "missing"),
            ("test-gpg --version", 0, ""),
        ):
            with self.subTest(command):
                status, _, stderr = self.ask(command, b"nothing of gpg\n")
                self.assertEqual(status, expected, stderr)
                self.assertIn(message, stderr)

    def test_120_key_survives_a_restart(self):
        secret = self.must(f"test-gpg -e -r {NAME}", b"for later\n")
        self.vault.shutdown(wait=True)
        self.vault.start()
        self.assertEqual(self.must("test-gpg -d", secret), b"for later\n")

    def test_130_policy_chooses_the_vault(self):
        self.qrexec_policy(SERVICE, self.work.name, "@default", target=self.vault.name)
        process = self.work.run("test-gpg -K", user="root", passio_popen=True)
        stdout, _ = process.communicate()
        self.assertEqual(process.returncode, 0)
        self.assertIn(NAME.encode(), stdout)


def list_tests():
    return (TC_00_SplitGpg,)
