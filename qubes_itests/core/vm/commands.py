"""Commands and services in a VM."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING, Any, Final

from qubes_itests.core.exc import QubesValueError, QubesVMNotRunningError
from qubes_itests.guest.link.frames import Channel
from qubes_itests.guest.link.process import LONGEST_ANSWER, answer_of
from qubes_itests.untrusted_text import quoted, safe_text

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Mapping

    from qubes_itests.core.vm.base import BaseVM
    from qubes_itests.core.vm.qubesvm import QubesVM
    from qubes_itests.guest.link.agent import GuestAgent
    from qubes_itests.guest.link.process import GuestProcess

__all__ = ["PIPES", "Commands", "communicate"]

#: Bytes of the error output that are shown with the error of a command.
_SHOWN: Final = 1000
_OUTPUTS: Final = {"stdout": Channel.STDOUT, "stderr": Channel.STDERR}
_NOT_CONNECTED: Final = (None, subprocess.DEVNULL)

#: The streams of a command whose caller talks to it.
PIPES: Final[dict[str, Any]] = dict.fromkeys(("stdin", *_OUTPUTS), subprocess.PIPE)


class Commands:
    """What runs commands and services in the guest of one VM.

    `stdin`, `stdout` and `stderr` are as for `asyncio.create_subprocess_exec`:
    ``subprocess.PIPE`` to get a stream; a descriptor or a file of the host, which may
    be closed then; ``stderr=subprocess.STDOUT`` to have both outputs as one. With
    DEVNULL or None the guest sees an empty input, and its output is dropped.

    :param vm: the VM.
    """

    def __init__(self, vm: QubesVM) -> None:
        self._vm = vm

    async def run(
        self,
        command: str,
        user: str | None = None,
        *,
        autostart: bool = False,
        gui: bool = False,
        environment: Mapping[str, str] | None = None,
        **streams: Any,
    ) -> GuestProcess:
        """Start a command in the guest's shell.

        :param command: as for ``sh -c``.
        :param user: who runs it; by default the VM's `default_user`.
        :param autostart: start the VM if it is halted.
        :param gui: what handlers of ``domain-cmd-pre-run`` are told; there is no GUI.
        :param environment: added to what the user's login gives.
        :return: a process, as `asyncio.create_subprocess_exec` returns one.
        :raise QubesVMNotRunningError: when the VM is halted or paused.
        """
        _check_streams(streams)
        agent = await self._agent(autostart=autostart, gui=gui)
        process = await agent.spawn(command, user=user, environment=environment or {})
        return _connect(process, streams)

    async def run_service(
        self,
        service: str,
        source: BaseVM | str | None = None,
        user: str | None = None,
        *,
        autostart: bool = False,
        gui: bool = False,
        **streams: Any,
    ) -> GuestProcess:
        """Start a qrexec service in the guest, as a call from `source`.

        :param service: ``SERVICE`` or ``SERVICE+ARGUMENT``.
        :param source: the VM that calls, or its name; dom0 by default.
        :param user: who runs it; by default the service's own choice.
        :param autostart: start the VM if it is halted.
        :param gui: as for `run`.
        :return: a process, as `run` returns one.
        """
        _check_streams(streams)
        agent = await self._agent(autostart=autostart, gui=gui)
        process = await agent.spawn_service(
            service, source=str(source) if source is not None else "dom0", user=user
        )
        return _connect(process, streams)

    async def _agent(self, *, autostart: bool, gui: bool) -> GuestAgent:
        vm = self._vm
        if autostart:
            await vm.start()
        if vm.life.is_paused:
            raise QubesVMNotRunningError(vm)
        # Handlers of a start may run commands already: the agent is there before the
        # VM counts as running, and only without one it matters why.
        agent = vm.life.agent or vm.life.running_agent()
        await vm.fire_event_async("domain-cmd-pre-run", pre_event=True, start_guid=gui)
        return agent

    async def ask(
        self,
        command: str,
        what: str,
        *,
        timeout: float,
        input: bytes = b"",
        user: str = "root",
        limit: int = LONGEST_ANSWER,
    ) -> tuple[bytes, bytes]:
        """Run a command that the harness itself needs, not a test; see `answer_of`.

        :param command: as for `run`.
        :param what: what the guest is to do, in words that follow "to".
        :param timeout: seconds.
        :param input: what it reads.
        :param user: who runs it.
        :param limit: bytes that it may write to each output.
        :return: its output and its error output.
        :raise QubesVMNotRunningError: when the VM is halted or paused.
        :raise subprocess.CalledProcessError: when it ends with another status than 0.
        :raise DeadlineError: when it does not end in time.
        :raise GuestError: when it writes too much, or the guest goes away.
        """
        process = await self.run(command, user, **PIPES)
        answer = await answer_of(
            process, what, timeout=timeout, input=input, limit=limit
        )
        answer.check(command)
        return answer.stdout, answer.stderr

    async def ask_service(
        self,
        service: str,
        what: str,
        *,
        timeout: float,
        input: bytes = b"",
        user: str | None = None,
    ) -> tuple[bytes, bytes]:
        """Run a service that the core itself needs; as `ask`.

        :param user: who runs it; by default the service's own choice.
        """
        process = await self.run_service(service, user=user, **PIPES)
        answer = await answer_of(process, what, timeout=timeout, input=input)
        answer.check(service)
        return answer.stdout, answer.stderr


async def communicate(
    process: GuestProcess | asyncio.subprocess.Process,
    command: str,
    data: bytes | None,
) -> tuple[bytes, bytes]:
    """Run a process to its end and return its output and its error output.

    :param process: what `run` or `run_service` of a VM returned.
    :param command: what it is, for the error.
    :param data: what it reads.
    :raise subprocess.CalledProcessError: when it ends with another status than 0.
    """
    if data is None and process.stdin is not None:
        data = b""  # a process of the host reads on until it is given something
    stdout, stderr = await process.communicate(data)
    if process.returncode:
        error = subprocess.CalledProcessError(
            process.returncode, command, stdout, stderr
        )
        if said := safe_text((stderr or b"")[-_SHOWN:].strip(), lines=True):
            error.add_note(quoted(said))
        raise error
    return stdout or b"", stderr or b""


def _check_streams(streams: Mapping[str, Any]) -> None:
    for name, stream in streams.items():
        if name not in _OUTPUTS and name != "stdin":
            raise QubesValueError(f"a command in a VM takes no argument {name!r}")
        if stream == subprocess.STDOUT and name == "stderr":
            continue
        if stream not in _NOT_CONNECTED and stream != subprocess.PIPE:
            _descriptor(name, stream)


def _descriptor(name: str, stream: Any) -> int:
    """Return the descriptor of what a stream is to be connected with."""
    try:
        number = stream if isinstance(stream, int) else stream.fileno()
        os.fstat(number)
    except (AttributeError, OSError, OverflowError, ValueError) as error:
        raise QubesValueError(
            f"{name}: expected PIPE, DEVNULL, or an open descriptor or file,"
            f" got {stream!r}"
        ) from error
    return int(number)


def _connect(process: GuestProcess, streams: Mapping[str, Any]) -> GuestProcess:
    stdin = streams.get("stdin")
    if stdin in _NOT_CONNECTED:
        process.stdin.write_eof()
    elif stdin != subprocess.PIPE:
        process.read_from(_descriptor("stdin", stdin))
    outputs = dict(_OUTPUTS)
    if streams.get("stderr") == subprocess.STDOUT:
        process.merge()
        del outputs["stderr"]
    for name, channel in outputs.items():
        stream = streams.get(name)
        if stream in _NOT_CONNECTED:
            process.drop(channel)
        elif stream != subprocess.PIPE:
            process.pass_on(channel, _descriptor(name, stream))
    return process
