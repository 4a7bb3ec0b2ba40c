"""VMs of the core for synchronous code, with asyncio hidden from tests.

Tests are ordinary code, which may block in its own thread; the VMs live on in the event
loop's thread.  A `VMWrapper` stands for one VM there, a `ProcessWrapper` for one
process in a VM: what the core has as coroutines, they have as plain calls.

Part of the old interface of Qubes OS is synchronous, part of it returns coroutines, and
plugins do not agree on which is which: ``p.wait()`` and
``loop.run_until_complete(p.wait())`` are both written. So results are there when a call
returns, and can be awaited all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import time
from typing import TYPE_CHECKING, Any, TypeVar

from qubes_itests.exc import DeadlineError
from qubes_itests.guest.link.frames import GONE
from qubes_itests.untrusted_text import quoted, safe_text

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Generator

    from qubes_itests.core.vm.base import BaseVM
    from qubes_itests.core.vm.qubesvm import QubesVM

__all__ = ["Done", "ExitStatus", "ProcessWrapper", "VMWrapper", "unwrapped"]

_T = TypeVar("_T")
#: Seconds between two attempts of a command that is waited for.
_PAUSE = 0.2
#: Seconds for a command to end that was killed.
_PATIENCE = 2.0
#: Bytes of error output that an error tells.
_SAID = 2000


class VMWrapper:
    """A VM, for synchronous code; what is not here is the VM's own.

    Properties are read and set on the VM.  It is equal to the VM, and has its hash and
    its string.  Coroutine methods that are not listed here stay coroutine methods:
    `create_on_disk`, `clone_disk_files`, `remove_from_disk` …

    :param vm: the VM.
    :param loop: the loop that it lives in; by default the current one.
    """

    _vm: QubesVM
    _loop: asyncio.AbstractEventLoop

    def __init__(
        self, vm: QubesVM | VMWrapper, loop: asyncio.AbstractEventLoop | None = None
    ) -> None:
        self._vm = unwrapped(vm)
        self._loop = loop or asyncio.get_event_loop()

    def __getattr__(self, name: str) -> Any:
        # `copy` and `pickle` ask for attributes before these two are set: looking for
        # them here would come back here without end.
        if name in ("_vm", "_loop"):
            raise AttributeError(name)
        return getattr(self._vm, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            super().__setattr__(name, value)
        else:
            setattr(self._vm, name, unwrapped(value))

    def __delattr__(self, name: str) -> None:
        delattr(self._vm, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self._vm)})

    def __str__(self) -> str:
        return str(self._vm)

    def __repr__(self) -> str:
        return f"<VMWrapper of {self._vm!r}>"

    def __eq__(self, other: object) -> bool:
        return bool(self._vm == unwrapped(other))

    def __lt__(self, other: object) -> bool:
        return bool(self._vm < unwrapped(other))

    def __hash__(self) -> int:
        return hash(self._vm)

    def start(
        self,
        start_guid: bool = True,
    ) -> VMWrapper:
        """Start the VM and return this; nothing if it runs.

        :raise QubesVMStartError: names the step that failed.
        """
        self._loop.run_until_complete(self._vm.start(start_guid=start_guid))
        return self

    def shutdown(self, **options: Any) -> VMWrapper:
        """Ask the guest to power off, and return this.

        :param options: ``wait=True`` returns when it is off; ``timeout=`` in seconds;
            ``force=True``.
        :raise QubesVMNotStartedError: when it does not run.
        """
        self._loop.run_until_complete(self._vm.shutdown(**options))
        return self

    def kill(self) -> Done:
        """Stop the VM at once; the result may be awaited and need not be."""
        return self._end(self._vm.kill)

    def pause(self) -> Done:
        """Stop its virtual CPUs; the result may be awaited and need not be."""
        return self._end(self._vm.pause)

    def unpause(self) -> Done:
        """Let its virtual CPUs run; the result may be awaited and need not be."""
        return self._end(self._vm.unpause)

    def _end(self, method: Any) -> Done:
        self._loop.run_until_complete(method())
        return Done()

    def clone_properties(
        self, src: QubesVM | VMWrapper, *args: Any, **kwargs: Any
    ) -> None:
        """Set this VM's properties to those of another."""
        self._vm.clone_properties(unwrapped(src), *args, **kwargs)

    def clone_disk_files(
        self, src: QubesVM | VMWrapper, **kwargs: Any
    ) -> Coroutine[Any, Any, None]:
        """Return a coroutine that copies the volumes of another VM."""
        return self._vm.clone_disk_files(unwrapped(src), **kwargs)

    def run(
        self,
        command: str,
        wait: bool = False,
        user: str | None = None,
        passio_popen: bool = False,
        passio_stderr: bool = False,
        **_gui: Any,
    ) -> int | ProcessWrapper | None:
        """Run a command in the VM.

        :param command: for the user's shell.
        :param wait: wait for it and return its exit status, whatever that is.
        :param user: who runs it; by default the VM's `default_user`.
        :param passio_popen: return the process, with stdin and stdout.
        :param passio_stderr: with stderr too.
        :param _gui: ``gui=`` and the like are accepted; there is no GUI.
        :return: with neither `wait` nor `passio_popen` nothing: the command goes on.
        :raise QubesVMNotRunningError: when the VM does not run.
        """
        if wait:
            return self._status(lambda: self._vm.run(command, user=user))
        streams = _streams(piped=passio_popen, stderr=passio_stderr)
        starting = self._vm.run(command, user=user, **streams)
        process = self._loop.run_until_complete(starting)
        return self._wrapped(process, streams)

    def succeed(
        self, command: str, user: str | None = None, timeout: float = 60.0
    ) -> str:
        """Run a command that has to succeed, and return its output.

        :param command: for the user's shell.
        :param user: who runs it; by default the VM's `default_user`.
        :param timeout: seconds that it may take.
        :return: what it wrote; bytes that are no UTF-8 are escaped.
        :raise AssertionError: it ended with another status than 0; what it wrote to
            its error output is told.
        :raise DeadlineError: it did not end in time.
        """
        status, output, said = self._attempt(command, user, timeout)
        if status is None:
            raise DeadlineError(f"end of {command!r} in {self}", timeout)
        if status:
            raise AssertionError(
                f"{command!r} in {self} ended with status {status}"
                + (f":\n{quoted(said)}" if said else "")
            )
        return output.decode("utf-8", "backslashreplace")

    def wait_until(
        self, command: str, timeout: float = 60.0, user: str | None = None
    ) -> str:
        """Run a command again and again until it succeeds, and return its output.

        :param command: for the user's shell.
        :param timeout: seconds for all attempts together.
        :param user: who runs it; by default the VM's `default_user`.
        :return: what it wrote at last; bytes that are no UTF-8 are escaped.
        :raise DeadlineError: it did not succeed in time; the last attempt is told.
        """
        end, last = time.monotonic() + timeout, "it did not end"
        while (left := end - time.monotonic()) > 0:
            status, output, said = self._attempt(command, user, left)
            if status == 0:
                return output.decode("utf-8", "backslashreplace")
            if status is not None:
                last = f"status {status}\n{said}".strip()
            # a guest that is emulated has other things to do as well
            time.sleep(min(_PAUSE, max(0.0, end - time.monotonic())))
        raise DeadlineError(f"success of {command!r} in {self}", timeout, last)

    def _attempt(
        self, command: str, user: str | None, timeout: float
    ) -> tuple[int | None, bytes, str]:
        """Return status (None: it did not end in time), output and error output."""

        async def within() -> tuple[int | None, bytes, str]:
            pipe = subprocess.PIPE
            process = await self._vm.run(command, user=user, stdout=pipe, stderr=pipe)
            try:
                async with asyncio.timeout(timeout):
                    output, errors = await process.communicate()
            except TimeoutError:
                process.kill()
                # A guest that hangs does not even end it.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_PATIENCE):
                        await process.communicate()
                return None, b"", ""
            said = safe_text((errors or b"")[-_SAID:], lines=True)
            return process.returncode, output or b"", said.strip()

        return self._loop.run_until_complete(within())

    def run_service(  # noqa: PLR0917 - as in Qubes OS
        self,
        service: str,
        wait: bool = True,
        input: str | bytes | None = None,
        user: str | None = None,
        passio_popen: bool = False,
        passio_stderr: bool = False,
        source: BaseVM | VMWrapper | str | None = None,
        **_gui: Any,
    ) -> int | ProcessWrapper | None:
        """Run a qrexec service in the VM, as a call from dom0.

        :param service: ``SERVICE`` or ``SERVICE+ARGUMENT``.
        :param wait: wait for it and return its exit status, unless `passio_popen`.
        :param input: what it reads; text is sent as UTF-8.
        :param user: who runs it; by default the service's own choice.
        :param passio_popen: return the process, with stdin and stdout.
        :param passio_stderr: with stderr too.
        :param source: the VM that calls; dom0 by default.
        :return: as `run`.
        """
        data = input.encode() if isinstance(input, str) else input
        streams: dict[str, Any] = _streams(piped=passio_popen, stderr=passio_stderr)
        if data:
            streams["stdin"] = subprocess.PIPE

        def start() -> Any:
            caller = unwrapped(source)
            return self._vm.run_service(service, caller, user, **streams)

        if wait and not passio_popen:
            return self._status(start, data)
        process = self._loop.run_until_complete(start())
        # The caller of `passio_popen` writes more, so its input stays open.
        self._loop.run_until_complete(_feed(process, data, end=not passio_popen))
        return self._wrapped(process, streams)

    def _status(self, start: Callable[[], Any], data: bytes | None = None) -> int:
        # One coroutine from the start to the end, so that the test's thread waits once:
        # between two waits the process could end, and with it its input.
        async def ended() -> int:
            process = await start()
            # One that ends before it has read all its input is no error of the caller.
            with contextlib.suppress(BrokenPipeError):
                await _feed(process, data, end=True)
            return int(await process.wait())

        try:
            return self._loop.run_until_complete(ended())
        except ConnectionError:
            # The command may have been what ended the VM: `poweroff`. The agent goes
            # before it can tell the exit status.
            return GONE

    def _wrapped(self, process: Any, streams: dict[str, int]) -> ProcessWrapper | None:
        if "stdout" not in streams:
            return None
        return ProcessWrapper(process, self._loop, stderr="stderr" in streams)


def unwrapped(value: VMWrapper | _T) -> QubesVM | _T:
    """Return the VM of a wrapper, and anything else as it is."""
    return value._vm if isinstance(value, VMWrapper) else value  # noqa: SLF001


def _streams(*, piped: bool, stderr: bool) -> dict[str, int]:
    if not piped:
        return {}
    names = ("stdin", "stdout", "stderr") if stderr else ("stdin", "stdout")
    return dict.fromkeys(names, subprocess.PIPE)


async def _feed(process: Any, data: bytes | None, *, end: bool) -> None:
    if data:
        process.stdin.write(data)
        await process.stdin.drain()
        if end:
            process.stdin.write_eof()


class ProcessWrapper:
    """A process in a VM, for synchronous code; what is not here is the process's own.

    So `returncode` is None until it has ended, and `stdout.read()` is a coroutine.

    :param proc: as `asyncio.create_subprocess_exec` returns one.
    :param loop: the loop that it lives in; by default the current one.
    :param stderr: whether the caller reads its error output.
    """

    _proc: Any
    _loop: asyncio.AbstractEventLoop

    def __init__(
        self,
        proc: Any,
        loop: asyncio.AbstractEventLoop | None = None,
        *,
        stderr: bool = True,
    ) -> None:
        self._proc = proc
        self._loop = loop or asyncio.get_event_loop()
        self._stderr = stderr
        self._stdin = _InputWrapper(proc.stdin, self._loop)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._proc, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            super().__setattr__(name, value)
        else:
            setattr(self._proc, name, value)

    def __repr__(self) -> str:
        return f"<ProcessWrapper of {self._proc!r}>"

    @property
    def stdin(self) -> Any:
        """Its input: `write`, and then `flush` or `drain`; `close` sends EOF."""
        return self._stdin

    @property
    def stderr(self) -> Any:
        """Its error output, None unless it was asked for."""
        return self._proc.stderr if self._stderr else None

    def communicate(
        self,
        input: bytes | None = None,
    ) -> tuple[bytes, bytes | None]:
        """Send `input` and EOF, read its output to the end, wait for it.

        :return: stdout and stderr; None for a stderr that was not asked for.
        """
        return self._loop.run_until_complete(self._communicate(input))

    async def _communicate(self, data: bytes | None) -> tuple[bytes, bytes | None]:
        # Empty rather than None, which would leave its input open: a process that reads
        # to the end of it would never end, and neither would this.
        stdout, stderr = await self._proc.communicate(data or b"")
        return stdout, stderr if self._stderr else None

    def wait(self) -> ExitStatus:
        """Wait until it has ended, and return its exit status."""
        return ExitStatus(self._loop.run_until_complete(self._proc.wait()))

    def terminate(self) -> None:
        """Send SIGTERM; nothing if it has ended."""
        self._signal(self._proc.terminate)

    def kill(self) -> None:
        """Send SIGKILL; nothing if it has ended."""
        self._signal(self._proc.kill)

    def send_signal(self, signal: int) -> None:
        """Send a signal; nothing if it has ended."""
        self._signal(lambda: self._proc.send_signal(signal))

    def _signal(self, send: Callable[[], None]) -> None:
        # It may end at any moment until the loop sends the signal; asyncio then raises.
        with contextlib.suppress(ProcessLookupError):
            _in_loop(self._loop, send)


class _InputWrapper:
    """The input of a process, for synchronous code."""

    def __init__(self, stdin: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._stdin = stdin
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stdin, name)

    def write(self, data: bytes) -> None:
        """Hand over what the process shall read; `flush` waits until it is sent."""
        _in_loop(self._loop, lambda: self._stdin.write(data))

    def writelines(self, lines: list[bytes]) -> None:
        """Write several."""
        self.write(b"".join(lines))

    def flush(self) -> None:
        """Wait until what was written is on its way to the process."""
        self._loop.run_until_complete(self._stdin.drain())

    def drain(self) -> Awaitable[None]:
        """Do what `flush` does; the result may be awaited and need not be."""
        # In the test's thread there is nobody to await a coroutine: a task goes on by
        # itself, and a coroutine would be reported as never awaited.
        if self._loop.is_running():
            drained: Awaitable[None] = self._stdin.drain()
            return drained
        return self._loop.create_task(self._stdin.drain())

    def write_eof(self) -> None:
        """Let the process read to the end of its input."""
        _in_loop(self._loop, self._stdin.write_eof)

    def close(self) -> None:
        """Let the process read to the end of its input."""
        _in_loop(self._loop, self._stdin.close)


def _in_loop(loop: asyncio.AbstractEventLoop, function: Callable[[], Any]) -> Any:
    """Call a function that does not block in the thread of the loop."""

    # Streams and processes of asyncio may be touched in the loop's thread only: from
    # the test's thread a write could meet the loop in the middle of its own, and bytes
    # would be lost or sent twice.  `is_running` is true in coroutines of the test,
    # which are in that thread already and would wait for themselves.
    async def call() -> Any:
        return function()

    return function() if loop.is_running() else loop.run_until_complete(call())


class Done:
    """The end of something that returns nothing."""

    def __await__(self) -> Generator[None]:
        yield from ()


class ExitStatus(int):
    """An exit status; awaiting it gives the same number."""

    __slots__ = ()

    def __await__(self) -> Generator[None, None, int]:
        yield from ()
        return int(self)
