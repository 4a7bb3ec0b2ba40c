"""VMs whose root attacks the harness through the agent's port, and what that costs.

`hostile_guest.c` is compiled here, and run in a real guest.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from subprocess import PIPE
from typing import TYPE_CHECKING, Any, NamedTuple

from qubes_itests.guest.exc import GuestGoneError
from qubes_itests.guest.link.frames import WINDOW

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

MIB = 1 << 20
#: What a hostile guest does, for ever.
ATTACKS = {
    "credit": "one CREDIT of 2 GiB, and a reader that sleeps",
    "many-credits": "all CREDIT that is allowed for 100 streams, whose readers sleep",
    "calls": "CALL with invalid names; the answers are not read",
    "reading-calls": "CALL with invalid names; the answers are read",
    "denied-calls": "CALL that the policy denies; the answers are not read",
    "logs": "LOG of 1,024 bytes",
    "closed": "CREDIT for a stream that has ended",
    "bytes": "DATA of one byte, as fast as credit allows",
}
_STREAMS = 100


class Cost(NamedTuple):
    """What an attack cost: growth in MiB, and how long another VM's `true` took."""

    growth: float
    usual: list[float]
    meanwhile: list[float]

    @property
    def ratio(self) -> float:
        """Return by how much `true` got slower: the median to the usual one."""
        return statistics.median(self.meanwhile) / statistics.median(self.usual)


def compile_program() -> bytes:
    """Return the program, which runs in any guest. Blocking."""
    source = Path(__file__).with_suffix(".c")
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "hostile"
        command = ["gcc", "-O2", "-static", "-s", "-o", str(program), str(source)]
        subprocess.run(command, check=True)
        return program.read_bytes()


def resident() -> float:
    """Return the MiB that this process has in memory."""
    status = Path("/proc/self/statm").read_text()
    return int(status.split()[1]) * 4096 / MIB


@contextlib.asynccontextmanager
async def attacking(vm: Any, program: bytes, attack: str) -> AsyncIterator[None]:
    """Have a running VM attack the harness; kill it afterwards.

    :param vm: of the core; good for nothing afterwards.
    :param program: from `compile_program`.
    :param attack: one of `ATTACKS`.
    """
    install = "cat > /tmp/hostile; chmod +x /tmp/hostile"
    await vm.run_for_stdio(install, user="root", input=program)
    tasks, arguments = [], [attack]
    if "credit" in attack:
        count = 1 if attack == "credit" else _STREAMS
        much = (1 << 31) - WINDOW if attack == "credit" else 3 * WINDOW
        sleepers = [await vm.run("sleep 3600", stdin=PIPE) for _ in range(count)]
        tasks = [asyncio.ensure_future(_fill(sleeper)) for sleeper in sleepers]
        arguments = ["credit", str(sleepers[0].pid), str(much), str(count)]
    elif attack == "closed":
        ended = await vm.run("true")
        await ended.wait()
        arguments.append(str(ended.pid))
    elif attack == "bytes":
        source = await vm.run("sleep 3600", stdout=PIPE)
        tasks = [asyncio.ensure_future(_drain(source))]
        arguments.append(str(source.pid))
    command = " ".join(["exec /tmp/hostile", *arguments])
    process = await vm.run(command, user="root", stderr=PIPE)
    trouble = asyncio.ensure_future(process.stderr.read())
    try:
        yield
        assert not (trouble.done() and not trouble.exception()), trouble.result()
    finally:
        await vm.kill()
        await asyncio.wait([trouble, *tasks])
        trouble.exception()


async def _fill(process: Any) -> None:
    chunk = bytes(WINDOW)
    with contextlib.suppress(GuestGoneError, BrokenPipeError):
        while True:
            process.stdin.write(chunk)
            await process.stdin.drain()


async def _drain(process: Any) -> None:
    with contextlib.suppress(GuestGoneError):
        while await process.stdout.read(WINDOW):
            pass


async def _trues(vm: Any, seconds: float) -> list[float]:
    """Run `true` again and again; return the seconds that each took."""
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken) < 3:
        start = time.perf_counter()
        await vm.run_for_stdio("true")
        taken.append(time.perf_counter() - start)
    return taken


async def cost(
    hostile: Any, other: Any, program: bytes, attack: str, *, seconds: float
) -> Cost:
    """Return what an attack costs that goes on for so long.

    :param hostile: a VM that runs, and is killed.
    :param other: another one, which runs commands meanwhile.
    """
    usual = await _trues(other, seconds / 3)
    before = resident()
    meanwhile, peak = [], before
    async with attacking(hostile, program, attack):
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            meanwhile += await _trues(other, 0.2)
            peak = max(peak, resident())
    return Cost(peak - before, usual, meanwhile)
