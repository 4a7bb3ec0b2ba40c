"""The base classes of tests."""

from __future__ import annotations

import contextlib
import logging
import re
import shlex
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, cast

from qubes_itests.compat_core2 import ProcessWrapper, VMWrapper, unwrapped
from qubes_itests.core.device.assignment import DeviceAssignment
from qubes_itests.core.device.port import Port, VirtualDevice
from qubes_itests.core.events import Emitter
from qubes_itests.core.exc import (
    QubesVMInUseError,
    QubesVMNotRunningError,
    QubesVMShutdownTimeoutError,
)
from qubes_itests.guest.link.frames import NOT_FOUND

from .emitter import EventAssertions
from .leaks import LeakError, LeakWatch
from .outcomes import Outcomes, TimedTestCase
from .suites import expects_failure, skipped_template

if TYPE_CHECKING:
    import asyncio
    import unittest
    from collections.abc import Callable, Iterable, Iterator

    from qubes_itests.core.app import Qubes
    from qubes_itests.core.policy import Policy
    from qubes_itests.core.vm.base import BaseVM
    from qubes_itests.core.vm.qubesvm import QubesVM
    from qubes_itests.run.testbed import Testbed

__all__ = [
    "CLSVMPREFIX",
    "VMPREFIX",
    "ExtraTestCase",
    "QubesTestCase",
    "SystemTestCase",
]

#: How names of VMs begin that belong to one test, and to a class of tests.
VMPREFIX: Final = "test-inst-"
CLSVMPREFIX: Final = "test-cls-"

#: Name of the net VM that `init_networking` makes.
NET_VM: Final = "sys-net"

#: Seconds that a user's session may take to begin.
_SESSION_TIMEOUT: Final = 60.0
#: Seconds that a guest has to write a file.
_FILE_TIMEOUT: Final = 60.0


class PolicyRule:
    """A rule of policy that holds until it is left as a context, or removed.

    :param policy: the app's.
    :param line: as in a policy file.
    """

    def __init__(self, policy: Policy, line: str) -> None:
        self._policy = policy
        self._rule = policy.add_rule(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the rule back; nothing if that was done before."""
        with contextlib.suppress(ValueError):
            self._policy.remove_rule(self._rule)


class QubesTestCase(EventAssertions, TimedTestCase):
    """A test with an event loop."""

    #: The event loop, which runs in another thread whatever this one does.
    loop: asyncio.AbstractEventLoop

    #: Name of the template under test, None for the run's first.
    template: str | None = None

    _testbed: Testbed
    _leaks: LeakWatch
    _outcomes: Outcomes

    def setUp(self) -> None:
        """Make the loop the current one, and begin to watch for leaks.

        :raise HarnessError: outside a run.
        """
        super().setUp()
        if part := skipped_template(self, getattr(self, self._testMethodName)):
            self.skipTest(f"not for templates with {part!r} in their names")
        from qubes_itests.run import testbed  # noqa: PLC0415 - `list` has no need of it

        self.log = logging.getLogger(f"qubes.tests.{type(self).__qualname__}")
        self._testbed = testbed.current()
        self._leaks = LeakWatch(self._testbed.portal, self._testbed.hypervisor)
        # As clean-ups, which happen even if the rest of setUp fails or skips. This one
        # is the first, so that it comes last, when the app and its VMs are gone.
        self.addCleanup(self._end)
        current = contextlib.ExitStack()
        self.loop = current.enter_context(self._testbed.portal.as_current_loop())
        self.addCleanup(current.close)

    def run(
        self, result: unittest.TestResult | None = None
    ) -> unittest.TestResult | None:
        """Run the test, and take note of whether it fails."""
        result = result if result is not None else self.defaultTestResult()
        self._outcomes = Outcomes(result)
        if expects_failure(self, getattr(self, self._testMethodName)):
            # what unittest looks at
            self.__unittest_expecting_failure__ = True
        return super().run(cast("unittest.TestResult", self._outcomes))

    @staticmethod
    def make_vm_name(name: str, class_teardown: bool = False) -> str:
        """Return the name of a VM of this test."""
        return (CLSVMPREFIX if class_teardown else VMPREFIX) + name

    def assertNotRaises(
        self,
        excClass: type[BaseException],
        callableObj: Callable[..., object] | None = None,
        *args: object,
        **kwargs: object,
    ) -> contextlib.AbstractContextManager[None] | None:
        """Fail if an error of that class is raised; another one is passed on.

        :param excClass: the class.
        :param callableObj: what to call, with the other arguments.
        :return: without `callableObj` a context, for a ``with`` block.
        """
        context = self._not_raising(excClass)
        if callableObj is None:
            return context
        with context:
            callableObj(*args, **kwargs)
        return None

    @contextlib.contextmanager
    def _not_raising(self, kind: type[BaseException]) -> Iterator[None]:
        raised = None
        try:
            yield
        except kind as error:
            # As text: the traceback would hold VMs until the end of the run, and each
            # of them would be taken for a leak.
            raised = "".join(traceback.format_exception(error))
        if raised is not None:
            self.fail(f"{kind.__name__} was raised:\n{raised}")

    def success(self) -> bool:
        """Return whether nothing of the test has failed, or was skipped, so far."""
        return self._outcomes.passed

    def _end(self) -> None:
        """Forget the VMs, and see what is left of them."""
        passed = self.success()
        self._forget_vms()
        # The traceback of a failure holds frames, and these hold VMs: they are no leak.
        leaks = self._leaks.end(objects=passed)
        if passed and leaks:
            raise LeakError(leaks)

    def _forget_vms(self) -> None:
        # A separate function: in `_end` the variables would hold a VM, which would be
        # found as a leak.
        for name, value in tuple(vars(self).items()):
            if _holds_vm(value):
                delattr(self, name)


class SystemTestCase(QubesTestCase):
    """A test with its own app, on the testbed's hypervisor."""

    #: The app.
    app: Qubes

    def setUp(self) -> None:
        """Make the app, which has the template and dom0.

        :raise HarnessError: when there is no such template.
        """
        super().setUp()
        template = self.template or self._testbed.run_templates[0]
        self.app = self.loop.run_until_complete(self._testbed.make_app(template))
        self.addCleanup(self._close_app, self.app)
        self.loop.run_until_complete(self._testbed.serve(self.app))
        self.app.add_handler("domain-add", self._leaks.vm_added)

    def _close_app(self, app: Qubes) -> None:
        """Remove the app and all VMs in it."""
        app.default_dispvm = None
        problems = self.loop.run_until_complete(self._testbed.close_app(app))
        if problems:
            raise LeakError(problems)

    def init_default_template(
        self, template: BaseVM | VMWrapper | str | None = None
    ) -> None:
        """Set the app's default template, by name or object."""
        if template is not None:
            self.app.default_template = self.app.domains[template]

    def init_networking(self) -> None:
        """Have a net VM, and all VMs of the app connected by it that name no other.

        It starts when the first of them does.
        """
        if self.app.default_netvm is None:
            making = self.app.create_vm(
                "AppVM",
                name=NET_VM,
                template=self.app.default_template,
                label="red",
                netvm=None,
                provides_network=True,
            )
            self.app.default_netvm = self.loop.run_until_complete(making)

    def remove_vms(self, vms: Iterable[QubesVM | VMWrapper]) -> None:
        """Kill VMs and remove them, those last that others of them use.

        Those that are gone are passed over.

        :raise QubesVMInUseError: when a VM that stays needs one of them.
        """
        self.loop.run_until_complete(self._remove_vms([unwrapped(vm) for vm in vms]))

    async def _remove_vms(self, vms: list[QubesVM]) -> None:
        present = [vm for vm in dict.fromkeys(vms) if vm in self.app.domains]
        if self.app.default_dispvm in present:
            self.app.default_dispvm = None
        for vm in present:
            if not vm.is_halted():
                await vm.kill()
        # a disposable VM has gone with its run
        while present := [vm for vm in present if vm in self.app.domains]:
            vm = next(filter(_is_unused, present), present[0])
            await self.app.domains.remove(vm)

    async def wait_for_session(self, vm: QubesVM | VMWrapper) -> None:
        """Wait until the session of the VM's default user has begun.

        A guest without the service that tells has no sessions to wait for.

        :raise TimeoutError: after a minute.
        :raise AssertionError: when the guest says that it failed.
        """
        import subprocess  # noqa: PLC0415 - `list` has no need of it

        vm = unwrapped(vm)
        try:
            await vm.commands.ask_service(
                "qubes.WaitForSession",
                "wait for the session of its user",
                timeout=_SESSION_TIMEOUT,
                input=vm.default_user.encode(),
            )
        except subprocess.CalledProcessError as error:
            if error.returncode != NOT_FOUND:
                raise AssertionError(
                    f"the session of {vm} did not begin: exit status"
                    f" {error.returncode}: {error.stderr.decode(errors='replace')}"
                ) from error

    async def start_vm(self, vm: QubesVM | VMWrapper) -> None:
        """Start a VM, and wait for its session; see `wait_for_session`."""
        await unwrapped(vm).start()
        await self.wait_for_session(vm)

    @staticmethod
    def set_hvm(vm: QubesVM | VMWrapper) -> None:
        """Have a VM start in the mode `hvm`."""
        vm.virt_mode = "hvm"

    async def wait_for_window_coro(
        self,
        title: str,
        search_class: bool = False,
        include_tray: bool = True,
        timeout: float = 30,
        show: bool = True,
    ) -> None:
        """Fail at once: there is no display here, and so no window to wait for.

        :param title: of the window.
        :param show: if False, wait until there is none, which holds at once.
        """
        del search_class, include_tray, timeout
        if show:
            self.fail(f"there is no window {title!r}: nothing here has a display")

    async def wait_for_window_hide_coro(
        self,
        title: str,
        winid: object,
        timeout: float = 30,
    ) -> None:
        """Wait until a window is gone, which holds at once; see above."""
        del winid
        await self.wait_for_window_coro(title, timeout=timeout, show=False)

    def wait_for_window(self, *args: Any, **kwargs: Any) -> None:
        """Block as long as `wait_for_window_coro` takes."""
        self.loop.run_until_complete(self.wait_for_window_coro(*args, **kwargs))

    def enter_keys_in_window(self, title: str, keys: Iterable[str]) -> None:
        """Wait for a window and press keys in it; see `wait_for_window_coro`."""
        del keys
        self.wait_for_window(title)

    def shutdown_and_wait(
        self,
        vm: QubesVM | VMWrapper,
        force: bool = False,
        timeout: float = 0,
    ) -> None:
        """Ask the guest to power off, and return when it is off; this blocks.

        :param force: as for `shutdown` of the VM.
        :param timeout: seconds; the test fails when they are over. 0 stands for the
            VM's `shutdown_timeout`.
        """
        name, timeout = vm.name, timeout or vm.shutdown_timeout
        shutdown = unwrapped(vm).shutdown(wait=True, force=force, timeout=timeout)
        try:
            self.loop.run_until_complete(shutdown)
        except QubesVMShutdownTimeoutError:
            # `fail` would raise with this error as its context, whose traceback holds
            # the VM.
            failed = True
        else:
            failed = False
        if failed:
            self.fail(f"VM {name} did not power off within {timeout} s")

    def shutdown_paused(self, vm: QubesVM | VMWrapper, timeout: float = 0) -> None:
        """Pause the VM, and shut it down; this blocks.

        The test fails when that is done without `force`, or not with it.
        """
        self.loop.run_until_complete(unwrapped(vm).pause())
        with self.assertRaises(QubesVMNotRunningError):  # noqa: PT027 - unittest it is
            self.loop.run_until_complete(unwrapped(vm).shutdown(wait=True))
        self.shutdown_and_wait(vm, force=True, timeout=timeout)

    def create_local_file(self, filename: str, content: str, mode: str = "w") -> None:
        """Write a file on the machine of the tests, for as long as the test takes.

        :param filename: its path.
        :param mode: as `open` takes it.
        """
        path = Path(filename)
        with path.open(mode, encoding="utf-8") as file:
            file.write(content)
        self.addCleanup(path.unlink, missing_ok=True)

    def create_remote_file(
        self, vm: QubesVM | VMWrapper, filename: str, content: str, mode: int = 0o755
    ) -> None:
        """Write a file in a VM, as root.

        :param mode: who may do what with it; services must be executable.
        """
        path = shlex.quote(filename)
        command = f"cat > {path} && chmod {mode:o} {path}"
        self.loop.run_until_complete(
            unwrapped(vm).commands.ask(
                command,
                f"write the file {filename}",
                timeout=_FILE_TIMEOUT,
                input=content.encode(),
            )
        )

    def qrexec_policy(  # noqa: PLR0917 - as in Qubes OS
        self,
        service: str,
        source: BaseVM | VMWrapper | str,
        destination: BaseVM | VMWrapper | str,
        allow: bool = True,
        target: BaseVM | VMWrapper | str | None = None,
        action: str | None = None,
    ) -> PolicyRule:
        """Allow (or deny) calls, before all other rules, for the rest of the test.

        As a context (``with self.qrexec_policy(…):``), for as long as that.

        :param service: ``SERVICE`` or ``SERVICE+ARGUMENT``.
        :param source: the VM that calls, its name, or a keyword (``@anyvm`` …).
        :param destination: the VM that is called, its name, or a keyword
            (``@default``, ``@dispvm`` …).
        :param allow: or deny.
        :param target: the VM that answers, whichever was called.
        :param action: in place of `allow`: ``allow user=root``, ``ask …``
        """
        action = action or ("allow" if allow else "deny")
        name, plus, argument = service.partition("+")
        # Tests are older than policy files of today, in which keywords begin with @.
        ends = (re.sub(r"\A\$", "@", str(end)) for end in (source, destination))
        words = [name, plus + argument or "*", *ends, action]
        if target is not None and action == "allow":
            words.append(f"target={target}")
        rule = PolicyRule(self.app.policy, " ".join(words))
        self.addCleanup(rule.remove)
        return rule


class ExtraTestCase(SystemTestCase):
    """The base of plugins' tests."""

    def setUp(self) -> None:
        """Have a VM for disposable VMs to be made from, beside the app."""
        super().setUp()
        making = self.app.create_vm(
            "AppVM",
            name=self.make_vm_name("dvm"),
            template=self.app.default_template,
            label="red",
            template_for_dispvms=True,
        )
        self.app.default_dispvm = self.loop.run_until_complete(making)

    def tearDown(self) -> None:
        """Let go of the VM for disposable VMs; the rest is done behind clean-ups."""
        self.app.default_dispvm = None
        super().tearDown()

    def create_vms(self, names: Iterable[str]) -> list[VMWrapper]:
        """Make AppVMs on the test's template, which are removed after the test.

        :param names: the VMs' names get the test's prefix before these.
        :return: the VMs, halted, in the order of the names.
        :raise QubesValueError: for a name that cannot be.
        """
        vms = []
        for name in map(self.make_vm_name, names):
            making = self.app.create_vm(
                "AppVM", name=name, template=self.app.default_template, label="red"
            )
            vm = self.loop.run_until_complete(making)
            vms.append(VMWrapper(vm, loop=self.loop))
        return vms

    def enable_network(self) -> None:
        """Connect all VMs of the test by a net VM; see `init_networking`."""
        self.init_networking()


def _is_unused(vm: QubesVM | VMWrapper) -> bool:
    try:
        vm.check_unused()
    except QubesVMInUseError:
        return False
    return True


def _holds_vm(value: Any) -> bool:
    # of a device its backend, of an assignment also who has it
    holders = VMWrapper, ProcessWrapper, Port, VirtualDevice, DeviceAssignment
    if isinstance(value, holders):
        return True
    if isinstance(value, dict):
        return any(_holds_vm(item) for item in (*value, *value.values()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return any(_holds_vm(item) for item in value)
    return isinstance(value, Emitter)  # an app, or a VM of any class
