"""What 10,000 hostile requests and reports do to the daemon: in a process of its own.

Run: ``.venv/bin/python tests/benchmarks/qmemman_hostile.py``

The exit status is 1 when the daemon is gone, does not balance, or has grown.
"""

from __future__ import annotations

import asyncio
import logging
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import hostility
from bench import heading, row

from qubes_itests.qmemman.balancer import Balancer
from qubes_itests.qmemman.client import Client
from qubes_itests.qmemman.server import Server
from qubes_itests.qmemman.simulation.machine import SimulatedMachine

MIB = 1024**2
ACTS, AT_ONCE = 10_000, 50
#: MiB that the daemon may grow after its first thousand.
MOST_GROWTH = 1.0


async def serve(socket):
    """Run the daemon; standard input says what guests do."""
    machine = SimulatedMachine(total=4000 * MIB, dom0=1000 * MIB)
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    async with Server(Balancer(machine), socket):
        machine.dom0.use(300 * MIB)
        good = machine.start("good", 400 * MIB, 2000 * MIB)
        bad = machine.start("bad", 400 * MIB, 600 * MIB)
        good.use(250 * MIB)
        while line := await reader.readline():
            name, _, text = line.decode().strip().partition(" ")
            if name == "use":
                good.use(int(text) * MIB)
            else:
                bad.report(bytes.fromhex(text))


def resident(pid):
    """Return the MiB that a process has in memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 / MIB


async def attack(daemon, socket):
    """Do it, print what came of it, and return whether all is well."""
    client = Client(socket)
    while not socket.exists():  # noqa: ASYNC110 - it is in another process
        await asyncio.sleep(0.05)
    chance = random.Random(7)  # noqa: S311 - repeatable, not secret

    def report(untrusted):
        daemon.stdin.write(b"report %s\n" % untrusted.hex().encode())
        daemon.stdin.flush()

    start, sizes, answers = time.monotonic(), [], []
    for done in range(0, ACTS, AT_ONCE):
        acts = (hostility.act(chance, socket, report) for _ in range(AT_ONCE))
        await asyncio.gather(*acts)
        asked = time.monotonic()
        await client.status()
        answers.append(1000 * (time.monotonic() - asked))
        if done >= ACTS // 10:
            sizes.append(resident(daemon.pid))
    taken = time.monotonic() - start
    daemon.stdin.write(b"use 1100\n")
    daemon.stdin.flush()
    rise = time.monotonic()
    while (await client.status())["domains"]["1"]["last_target"] < 1400 * MIB:
        if time.monotonic() - rise > 10:
            return False
        await asyncio.sleep(0.02)
    heading(f"{ACTS} hostile requests and reports")
    row("time", [taken])
    row("answer to STATUS meanwhile", answers, unit="ms")
    row("daemon's memory", sizes, unit="MiB", bound=f"growth < {MOST_GROWTH:g} MiB")
    row("then: from a rise of use to the target", [time.monotonic() - rise])
    return daemon.poll() is None and sizes[-1] - sizes[0] < MOST_GROWTH


def main():
    """Start the daemon, attack it and judge."""
    if sys.argv[1:]:
        logging.disable(logging.CRITICAL)
        asyncio.run(serve(Path(sys.argv[1])))
        return
    with tempfile.TemporaryDirectory() as directory:
        socket = Path(directory) / "qmemman.sock"
        daemon = subprocess.Popen(
            [sys.executable, __file__, str(socket)], stdin=subprocess.PIPE
        )
        try:
            well = asyncio.run(attack(daemon, socket))
        finally:
            daemon.kill()
            daemon.wait()
    sys.exit(0 if well else "the daemon did not bear it")


if __name__ == "__main__":
    main()
