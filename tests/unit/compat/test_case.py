"""The base class of tests: set-up, tear-down, and what it finds left behind."""

import asyncio
import gc
import os
import socket
import unittest
import warnings
from pathlib import Path

import pytest

from qubes_itests.compat_core2 import unwrapped
from qubes_itests.core.device.assignment import DeviceAssignment
from qubes_itests.core.device.info import DeviceInfo
from qubes_itests.core.device.port import Port, VirtualDevice
from qubes_itests.core.exc import (
    QubesVMInUseError,
    QubesVMNotRunningError,
    QubesVMShutdownTimeoutError,
)
from qubes_itests.run import testbed as testbed_module
from qubes_itests.testcase import (
    ExtraTestCase,
    LeakError,
    expectedFailureIfTemplate,
    leaks,
    skipIfTemplate,
)

KEPT = []


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    monkeypatch.setattr(leaks, "_GRACE", 0.1)
    yield
    KEPT.clear()


def run(body, **attributes):
    """Run a test of this body, and return unittest's result."""
    case = type("TC", (ExtraTestCase,), {"test": body, **attributes})("test")
    result = unittest.TestResult()
    case.run(result)
    return result


def failure(body, **attributes):
    result = run(body, **attributes)
    ((_, text),) = [*result.errors, *result.failures]
    return text


def test_set_up(bed):
    def body(self):
        assert self.app.default_template.name == "tiny"
        assert self.app.default_dispvm.name == "test-inst-dvm"
        assert self.app.default_dispvm.template_for_dispvms
        assert asyncio.get_event_loop() is self.loop is bed.portal.facade
        first, second = self.create_vms(["one", "two"])
        assert (first.name, second.name) == ("test-inst-one", "test-inst-two")
        self.vms = [first, second]
        self.by_name = {"one": first}

    result = run(body)
    assert result.wasSuccessful(), result.errors
    assert bed.closed == 1


@pytest.mark.usefixtures("bed")
def test_template_of_the_class():
    def body(self):
        assert self.app.default_template.name == "big"

    assert run(body, template="big").wasSuccessful()


def test_outside_a_run_it_says_so():
    assert not testbed_module._current
    assert "or with `pytest -p qubes_itests`" in failure(lambda _: None)


def test_skip_in_set_up_still_cleans_up(bed):
    """Plugins skip in setUp after VMs were started; tearDown is not called then."""

    def skip(self):
        ExtraTestCase.setUp(self)
        self.create_vms(["one"])[0].start()
        self.skipTest("not for this template")

    result = run(lambda _: None, setUp=skip)
    assert result.wasSuccessful()
    assert len(result.skipped) == 1
    assert bed.closed == 1


def test_skip_before_set_up(bed):
    def skip(self):
        self.skipTest("not for this template")

    assert len(run(lambda _: None, setUp=skip).skipped) == 1
    assert bed.closed == 0


@pytest.mark.usefixtures("bed")
def test_remove_vms_in_tear_down():
    def tear_down(self):
        self.remove_vms((self.vm, self.vm, self.app.default_dispvm))
        ExtraTestCase.tearDown(self)

    def body(self):
        (self.vm,) = self.create_vms(["one"])
        self.vm.start()

    assert run(body, tearDown=tear_down).wasSuccessful()


@pytest.mark.usefixtures("bed")
def test_remove_vms_in_any_order():
    """Those that others use come last; what a VM that stays uses is not removed."""

    def body(self):
        net, proxy, client = self.create_vms(["net", "proxy", "client"])
        proxy.netvm, client.netvm = net, proxy
        client.start()
        with self.assertRaises(QubesVMInUseError):
            self.remove_vms([net, proxy])
        self.remove_vms(iter([net, client, proxy]))
        left = {str(vm) for vm in self.app.domains}
        self.assertEqual(left, {"tiny", "test-inst-dvm"})
        self.assertIsNotNone(self.app.default_dispvm)
        self.remove_vms([self.app.default_dispvm])
        self.assertIsNone(self.app.default_dispvm)

    result = run(body)
    assert result.wasSuccessful(), result.errors


@pytest.mark.usefixtures("bed")
def test_create_remote_file(tmp_path):
    """Either form of a VM will do; the name may be any."""

    def body(self):
        (vm,) = self.create_vms(["vm"])
        vm.start()
        for either in (vm, vm._vm):
            path = tmp_path / f"it's {type(either).__name__}"
            self.create_remote_file(either, str(path), "#!/bin/sh\necho §\n")
            self.assertEqual(path.read_text(), "#!/bin/sh\necho §\n")
            self.assertEqual(path.stat().st_mode & 0o777, 0o755)
        self.assertEqual([call[1] for call in vm.calls[1:]], ["root", "root"])

    result = run(body)
    assert result.wasSuccessful(), result.errors


@pytest.mark.usefixtures("bed")
def test_policy():
    rules = []

    def body(self):
        vm, other = self.create_vms(["one", "two"])
        self.qrexec_policy("t.Echo", vm, "@default", target=other)
        with self.qrexec_policy("t.Echo+arg", vm.name, other.name, allow=False):
            rules.extend(map(str, self.app.policy.rules))
        assert len(self.app.policy.rules) == 1
        with self.qrexec_policy("t.Echo", vm, "dom0", action="allow user=root"):
            rules.append(str(self.app.policy.rules[0]))

    result = run(body)
    assert result.wasSuccessful(), result.errors
    assert [rule.split() for rule in rules] == [
        ["t.Echo", "+arg", "test-inst-one", "test-inst-two", "deny"],
        ["t.Echo", "*", "test-inst-one", "@default", "allow", "target=test-inst-two"],
        ["t.Echo", "*", "test-inst-one", "@adminvm", "allow", "user=root"],
    ]


@pytest.mark.parametrize("command", ["exit 0", "exit 127"])
@pytest.mark.usefixtures("bed")
def test_wait_for_session(command):
    def body(self):
        (vm,) = self.create_vms(["one"])
        vm.start()
        vm.services["qubes.WaitForSession"] = command
        coroutine = self.wait_for_session(vm)
        assert asyncio.iscoroutine(coroutine)
        self.loop.run_until_complete(coroutine)

    result = run(body)
    assert result.wasSuccessful(), result.errors


@pytest.mark.usefixtures("bed")
def test_a_session_that_fails():
    def body(self):
        (vm,) = self.create_vms(["one"])
        vm.start()
        vm.services["qubes.WaitForSession"] = "echo no seat >&2; exit 1"
        self.loop.run_until_complete(self.wait_for_session(vm))

    assert "test-inst-one did not begin: exit status 1: no seat" in failure(body)


@pytest.mark.usefixtures("bed")
def test_a_device_that_a_test_keeps_leaves_no_vm():
    """Nor what is of a device, as all of it knows its backend."""

    def body(self):
        (vm,) = self.create_vms(["one"])
        port = Port(unwrapped(vm), "loop0", "block")
        self.device = DeviceInfo(port)
        self.all = [port, VirtualDevice(port), DeviceAssignment(self.device)]

    result = run(body)
    assert result.wasSuccessful(), result.errors


@pytest.mark.usefixtures("bed")
def test_a_left_vm_object():
    def body(self):
        KEPT.append(self.create_vms(["kept"])[0])

    text = failure(body)
    assert LeakError.__name__ in text
    assert "VM object test-inst-kept, held by" in text


def test_who_holds_it_is_found_though_it_is_older_than_the_test(bed):
    """What was frozen for that is thawed, until the next test begins."""
    KEPT.append(asyncio.Event())
    gc.freeze()
    watch = leaks.LeakWatch(bed.portal, bed.hypervisor)
    assert watch._holders(KEPT[0]) == "list"
    assert watch._holders(KEPT[0]) == "list"
    watch.end()
    assert not gc.get_freeze_count()
    leaks.LeakWatch(bed.portal, bed.hypervisor).end()
    assert gc.get_freeze_count()


def test_a_left_task(bed):
    async def forever():
        await asyncio.Event().wait()

    def body(self):
        async def start():
            KEPT.append(asyncio.create_task(forever()))

        self.loop.run_until_complete(start())

    text = failure(body)
    assert "task test_a_left_task.<locals>.forever (test_case.py:" in text
    (task,) = KEPT
    with pytest.raises(asyncio.CancelledError):
        bed.portal.run(task, timeout=300)


@pytest.mark.usefixtures("bed")
def test_a_task_that_ends_late_on_a_busy_machine_is_none_that_is_left(monkeypatch):
    monkeypatch.setattr(leaks.load, "delay", lambda: 3000.0)

    def body(self):
        self.loop.create_task(asyncio.sleep(0.3))

    assert run(body).wasSuccessful()


@pytest.mark.usefixtures("bed")
def test_a_left_file(tmp_path):
    def body(_self):
        KEPT.append(os.open(tmp_path, os.O_RDONLY))

    try:
        text = failure(body)
        assert f"open file {KEPT[0]}: {tmp_path}" in text
    finally:
        os.close(KEPT[0])


@pytest.mark.usefixtures("bed")
def test_a_left_socket():
    def body(_self):
        KEPT.append(socket.socket())

    try:
        assert "socket:[" in failure(body)
    finally:
        KEPT[0].close()


@pytest.mark.usefixtures("bed")
def test_a_coroutine_nobody_awaited():
    """Also when it is gone in the middle of the test, and seen as a warning then."""

    def body(self):
        (vm,) = self.create_vms(["one"])
        vm.create_on_disk()

    assert "coroutine 'FakeVM.create_on_disk' was never awaited" in failure(body)


@pytest.mark.usefixtures("bed")
def test_other_warnings_are_handed_on():
    def body(_self):
        warnings.warn("heed this", UserWarning, stacklevel=1)

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert run(body).wasSuccessful()
    assert [str(w.message) for w in seen] == ["heed this"]


@pytest.mark.usefixtures("bed")
def test_an_error_of_the_background():
    def body(self):
        def stumble():
            raise ArithmeticError("unseen")

        self.loop.call_soon_threadsafe(stumble)

    assert "an error that no code has handled" in failure(body)


def test_problems_of_the_app_fail_the_test(bed):
    bed.problems = ["VM x could not be killed"]
    assert "VM x could not be killed" in failure(lambda _: None)


@pytest.mark.usefixtures("bed")
def test_a_failing_test_has_one_failure():
    """The leaks of a test that failed anyway are not worth a second error."""

    def body(self):
        KEPT.append(self.create_vms(["kept"])[0])
        self.fail("the real cause")

    assert "the real cause" in failure(body)


@pytest.mark.usefixtures("bed")
def test_start_and_shutdown_of_a_vm():
    """Either form of a VM will do: the wrapper, or the core's own."""

    def body(self):
        (vm,) = self.create_vms(["vm"])
        for either in (vm, vm._vm):
            self.loop.run_until_complete(self.start_vm(either))
            assert vm.is_running()
            self.shutdown_and_wait(either)
            assert not vm.is_running()

    result = run(body)
    assert result.wasSuccessful(), result.errors


@pytest.mark.usefixtures("bed")
def test_a_vm_that_does_not_shut_down_fails_the_test():
    """As a failure that names the VM, and not as an error, nor as a leak."""

    def body(self):
        (vm,) = self.create_vms(["vm"])

        async def shutdown(**options):
            raise QubesVMShutdownTimeoutError("test-inst-vm", options["timeout"])

        vm._vm.shutdown = shutdown
        self.shutdown_and_wait(vm, timeout=3)

    result = run(body)
    assert not result.errors, result.errors
    ((_, text),) = result.failures
    assert "VM test-inst-vm did not power off within 3 s" in text


@pytest.mark.usefixtures("bed")
def test_what_must_not_be_raised():
    """It is a failure, of text alone; what else is raised is passed on."""

    def body(self):
        with self.assertNotRaises(KeyError):
            pass
        self.assertNotRaises(KeyError, dict.get, {}, "x")
        with pytest.raises(ZeroDivisionError), self.assertNotRaises(KeyError):
            raise ZeroDivisionError
        with self.assertNotRaises(LookupError):
            raise KeyError("no such thing")

    result = run(body)
    assert not result.errors, result.errors
    ((_, text),) = result.failures
    assert "LookupError was raised" in text
    assert "no such thing" in text


@pytest.mark.parametrize(("template", "skipped"), [("big", 1), ("tiny", 0), (None, 0)])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.usefixtures("bed")
def test_skipped_on_some_templates(template, skipped, whole):
    mark = skipIfTemplate("b", "x")
    case = {"test": lambda _: None, "template": template}
    if not whole:
        case["test"] = mark(case["test"])
    cls = type("TC", (ExtraTestCase,), case)
    result = unittest.TestResult()
    (mark(cls) if whole else cls)("test").run(result)
    assert result.wasSuccessful(), result.errors
    assert len(result.skipped) == skipped


@pytest.mark.usefixtures("bed")
def test_expected_to_fail_on_some_templates():
    @expectedFailureIfTemplate(("big-minimal", "x"))
    def fail(self):
        self.fail("as it is")

    @expectedFailureIfTemplate("big")
    def work(_self):
        pass

    assert len(run(fail, template="big").expectedFailures) == 1
    assert len(run(fail, template="tiny").failures) == 1
    assert len(run(work, template="big").unexpectedSuccesses) == 1
    assert run(work, template="tiny").wasSuccessful()


@pytest.mark.usefixtures("bed")
def test_files_of_dom0_are_gone_after_the_test(tmp_path):
    path = tmp_path / "made"

    def body(self):
        self.create_local_file(str(path), "text\n")
        self.create_local_file(str(path), "more\n", mode="a")
        assert path.read_text() == "text\nmore\n"

    result = run(body)
    assert result.wasSuccessful(), result.errors
    assert not path.exists()


@pytest.mark.usefixtures("bed")
def test_a_paused_vm_is_shut_down_with_force_only():
    def body(self):
        (vm,) = self.create_vms(["vm"])
        vm.start()
        asked = []

        async def pause():
            asked.append("pause")

        async def shutdown(*, force=False, **_options):
            asked.append(force)
            if self.refuses and not force:
                raise QubesVMNotRunningError(vm)

        vm._vm.pause, vm._vm.shutdown = pause, shutdown
        self.shutdown_paused(vm)
        assert asked == ["pause", False, True]

    assert run(body, refuses=True).wasSuccessful()
    assert "QubesVMNotRunningError not raised" in failure(body, refuses=False)


@pytest.mark.usefixtures("bed")
def test_a_window_is_not_waited_for():
    """There is no display: one that is to come fails, one that is to go is gone."""

    def body(self):
        self.wait_for_window("work", show=False)
        self.loop.run_until_complete(self.wait_for_window_hide_coro("work", "0x1"))
        for wait in (
            lambda: self.wait_for_window("work", search_class=True, timeout=1),
            lambda: self.enter_keys_in_window("work", ["Return"]),
        ):
            with self.assertRaisesRegex(AssertionError, "no window 'work': .* display"):
                wait()

    assert run(body).wasSuccessful()


@pytest.mark.usefixtures("bed")
def test_set_hvm():
    def body(self):
        (vm,) = self.create_vms(["one"])
        self.set_hvm(vm)
        self.assertEqual(vm.virt_mode, "hvm")

    assert run(body).wasSuccessful()


def test_the_search_for_open_files_opens_none(tmp_path):
    """Of a number that was a socket's, and is another file's by now."""
    with (tmp_path / "file").open("w") as file:
        before = set(Path("/proc/self/fd").iterdir())
        assert leaks._peer(str(file.fileno()), "socket:[1]") == ""
        assert set(Path("/proc/self/fd").iterdir()) == before
