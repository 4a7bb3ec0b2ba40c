"""A process in a VM, for synchronous code."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from .awaitable import ExitStatus

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["ProcessWrapper"]


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
        input: bytes | None = None,  # noqa: A002 - as in subprocess
    ) -> tuple[bytes, bytes | None]:
        """Send `input` and EOF, read its output to the end, wait for it.

        :return: stdout and stderr; None for a stderr that was not asked for.
        """
        return self._loop.run_until_complete(self._communicate(input))

    async def _communicate(self, data: bytes | None) -> tuple[bytes, bytes | None]:
        # not None: that would leave its input open
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
        """Do what `flush` does, for whoever awaits it; it need not be awaited."""
        if self._loop.is_running():
            return self._stdin.drain()  # type: ignore[no-any-return]
        return self._loop.create_task(self._stdin.drain())

    def write_eof(self) -> None:
        """Let the process read to the end of its input."""
        _in_loop(self._loop, self._stdin.write_eof)

    def close(self) -> None:
        """Let the process read to the end of its input."""
        _in_loop(self._loop, self._stdin.close)


def _in_loop(loop: asyncio.AbstractEventLoop, function: Callable[[], Any]) -> Any:
    """Call a function that does not block in the thread of the loop."""

    async def call() -> Any:
        return function()

    return function() if loop.is_running() else loop.run_until_complete(call())
