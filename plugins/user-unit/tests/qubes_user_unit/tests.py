"""VM `greeter` has a socket unit in the user's session, which calls reach."""

import qubes.tests.extra

SERVICE = "test.Greeter"
FEATURE = "service.test-greeter"
#: Exit status of the service in a VM that has not been given the feature.
NOT_OFFERED = 5


class TC_00_UserUnit(qubes.tests.extra.ExtraTestCase):
    def setUp(self):
        super().setUp()
        (self.greeter,) = self.create_vms(["greeter"])

    def start(self):
        self.greeter.start()
        self.loop.run_until_complete(self.wait_for_session(self.greeter))

    def call(self):
        """Return (exit status, stdout, stderr) of a call from dom0."""
        process = self.greeter.run_service(
            SERVICE, passio_popen=True, passio_stderr=True
        )
        stdout, stderr = process.communicate(b"dom0\n")
        return process.returncode, stdout.decode(), stderr.decode()

    def state(self, unit):
        """Return whether a unit of the user is active, in systemd's word."""
        process = self.greeter.run(
            f"systemctl --user show -P ActiveState {unit}", passio_popen=True
        )
        stdout, _ = process.communicate()
        return stdout.decode().strip()

    def test_000_call_from_another_vm(self):
        self.greeter.features[FEATURE] = True
        (caller,) = self.create_vms(["caller"])
        caller.features["init"] = "agent"  # it has no part in the session
        caller.start()
        self.start()
        self.qrexec_policy(SERVICE, caller.name, self.greeter.name)
        for name in ("alice", "bob"):
            process = caller.run(
                f"qrexec-client-vm {self.greeter.name} {SERVICE}", passio_popen=True
            )
            stdout, _ = process.communicate(name.encode() + b"\n")
            self.assertEqual(process.returncode, 0)
            greeting, cgroup = stdout.decode().splitlines()
            self.assertEqual(greeting, f"hello {name}")
            # it is one of the session's own, and no child of the call
            self.assertTrue(cgroup.startswith("user@1000.service/"), cgroup)
            self.assertIn("test-greeter@", cgroup)

    def test_010_not_offered(self):
        self.greeter.features["service.other"] = True
        self.start()
        self.assertEqual(self.state("sockets.target"), "active")
        self.assertEqual(self.state("test-greeter.socket"), "inactive")
        status, stdout, stderr = self.call()
        self.assertEqual((status, stdout), (NOT_OFFERED, ""))
        self.assertIn("offers no greeter", stderr)

    def test_020_session_comes_first(self):
        self.greeter.features[FEATURE] = True
        self.greeter.start()
        # With its directory, where the socket is. Not before logind knows that the user
        # lingers: it has these units start, which would take the stop back.
        state = "loginctl show-user user --property State"
        units = "user@1000.service user-runtime-dir@1000.service"
        wait = f"until {state} | grep lingering; do sleep 1; done"
        stop = f"{wait}; systemctl stop {units}"
        self.assertEqual(self.greeter.run(stop, user="root", wait=True), 0)
        self.assertEqual(self.call()[0], NOT_OFFERED)
        self.loop.run_until_complete(self.wait_for_session(self.greeter))
        status, stdout, stderr = self.call()
        self.assertEqual(status, 0, stderr)
        self.assertIn("hello dom0", stdout)


def list_tests():
    return (TC_00_UserUnit,)
