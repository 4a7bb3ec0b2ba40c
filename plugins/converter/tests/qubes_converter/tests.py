"""VM `work` has images, which disposable VMs read for it: service test.ConvertImage."""

import time

import qubes.tests.extra

SERVICE = "test.ConvertImage"
#: 3 x 2 pixels.
PIXELS = bytes(range(0, 180, 10))
PPM = b"P6\n3 2\n255\n" + PIXELS
#: Seconds until a disposable VM whose call has ended has to be gone.
GONE_WITHIN = 300
#: Seconds for one to be there, on a busy machine.
THERE_WITHIN = 300

#: What a VM that was taken over may answer, as a command in it.
HOSTILE = {
    "nothing": "true",
    "no image": "echo '<svg/>'",
    "other depth": r"printf 'P6\n1 1\n65535\nabcdef'",
    "no pixels": r"printf 'P6\n0 1\n255\n'",
    "too big": r"printf 'P6\n99999 99999\n255\n'; cat /dev/zero",
    "too little": r"printf 'P6\n2 2\n255\nabc'",
    "too much": r"printf 'P6\n1 1\n255\nabcd'",
    "endless": r"printf 'P6\n1 1\n255\n'; cat /dev/zero",
    "failed": r"printf 'P6\n1 1\n255\nabc'; exit 1",
}


class TC_00_Converter(qubes.tests.extra.ExtraTestCase):
    def setUp(self):
        super().setUp()
        (self.work,) = self.create_vms(["work"])
        self.work.start()

    def allow(self, target=None):
        self.qrexec_policy(SERVICE, self.work.name, "@dispvm", target=target)

    def must(self, command, data=b""):
        """Return what a command in `work` that must succeed writes to stdout."""
        process = self.work.run(command, passio_popen=True, passio_stderr=True)
        stdout, stderr = process.communicate(data)
        self.assertEqual(process.returncode, 0, stderr)
        return stdout

    def convert(self, source="image"):
        """Return (exit status, error output) of a conversion to `safe.png`."""
        process = self.work.run(
            f"test-convert {source} safe.png", passio_popen=True, passio_stderr=True
        )
        _, stderr = process.communicate()
        return process.returncode, stderr.decode()

    def disposables(self):
        return [vm.name for vm in self.app.domains if vm.klass == "DispVM"]

    def wait_until(self, condition, seconds):
        """Return whether something has come true in time."""
        end = time.monotonic() + seconds
        while not condition() and time.monotonic() < end:
            time.sleep(0.1)
        return condition()

    def assert_nothing_made(self):
        self.assertEqual(self.must("ls safe.* 2>/dev/null || true"), b"")

    def test_000_png(self):
        """The pixels are the same, and the VM that has seen the image is gone."""
        self.allow()
        self.must("pnmtopng >image", PPM)
        self.assertEqual(self.convert(), (0, ""))
        gone = self.wait_until(lambda: not self.disposables(), GONE_WITHIN)
        self.assertTrue(gone, self.disposables())
        self.assertEqual(self.must("pngtopnm safe.png"), PPM)

    def test_010_disposable_lives_as_long_as_its_call(self):
        self.allow()
        self.must("pnmtojpeg --quality=100 >image", PPM)
        process = self.work.run(
            f"qrexec-client-vm @dispvm {SERVICE}", passio_popen=True
        )
        there = self.wait_until(self.disposables, THERE_WITHIN)
        self.assertTrue(there)
        self.assertIsNone(process.returncode)
        image = self.must("cat image")
        stdout, _ = process.communicate(image)
        self.assertEqual(process.returncode, 0)
        self.assertEqual(stdout[:11], PPM[:11])
        self.assertEqual(len(stdout), len(PPM))
        gone = self.wait_until(lambda: not self.disposables(), GONE_WITHIN)
        self.assertTrue(gone, self.disposables())

    def test_020_not_an_image(self):
        self.allow()
        self.must("echo '#!/bin/sh' >image")
        status, stderr = self.convert()
        self.assertEqual(status, 1)
        self.assertIn("not converted", stderr)
        self.assert_nothing_made()

    def test_030_hostile_answers(self):
        (evil,) = self.create_vms(["evil"])
        evil.start()
        self.allow(target=evil.name)
        path = f"/etc/qubes-rpc/{SERVICE}"
        answer = "#!/bin/sh\ncat >/dev/null\n. /tmp/answer\n"
        process = evil.run(f"cat >{path}", user="root", passio_popen=True)
        process.communicate(answer.encode())
        self.must("pnmtopng >image", PPM)
        for name, command in HOSTILE.items():
            with self.subTest(name):
                process = evil.run("cat >/tmp/answer", passio_popen=True)
                process.communicate(command.encode())
                status, stderr = self.convert()
                self.assertEqual(status, 1, stderr)
                self.assertIn("not converted", stderr)
                self.assert_nothing_made()

    def test_040_no_vm_for_it(self):
        self.must("pnmtopng >image", PPM)
        with self.subTest("no policy"):
            self.assert_refused()
        self.allow()
        self.app.default_dispvm = None
        with self.subTest("no default_dispvm"):
            self.assert_refused()

    def assert_refused(self):
        status, stderr = self.convert()
        self.assertEqual(status, 126, stderr)
        self.assertIn("test-convert: no disposable VM", stderr)
        self.assertEqual(self.disposables(), [])
        self.assert_nothing_made()


def list_tests():
    return (TC_00_Converter,)
