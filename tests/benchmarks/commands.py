"""How quick commands and streams are, once a VM runs.

Run: ``.venv/bin/python tests/benchmarks/commands.py``
"""

from __future__ import annotations

import asyncio
import sys
import time

from bench import app_on, heading, row, seconds, testbed

MIB = 1024**2
STREAM = 64 * MIB
COMMANDS = 200
CONCURRENT = 50


async def through_cat(vm, size):
    """Send `size` bytes through cat, in and out at once; return seconds."""
    process = await vm.run("cat", stdin=-1, stdout=-1)
    chunk = bytes(range(256)) * 1024
    start = time.perf_counter()

    async def write():
        for _ in range(size // len(chunk)):
            process.stdin.write(chunk)
            await process.stdin.drain()
        process.stdin.write_eof()

    async def read():
        total = 0
        while data := await process.stdout.read(MIB):
            total += len(data)
        return total

    _, total = await asyncio.gather(write(), read())
    taken = time.perf_counter() - start
    if total != size or await process.wait():
        sys.exit(f"cat lost data: {total} of {size} bytes")
    return taken


async def concurrent(vm, number):
    """Run commands at once, each with output of its own."""
    outputs = await asyncio.gather(
        *(vm.run_for_stdio(f"echo {n}; echo err{n} >&2") for n in range(number))
    )
    expected = [(f"{n}\n".encode(), f"err{n}\n".encode()) for n in range(number)]
    if outputs != expected:
        sys.exit("commands got each other's output")


def main():
    """Measure and print."""
    with testbed() as bed, app_on(bed) as app:
        run = bed.portal.run
        vm = app.add_new_vm("AppVM", name="work", label="red")
        run(vm.create_on_disk())
        run(vm.start())
        heading(f"Commands, {COMMANDS} in a row")
        times = [
            1000 * seconds(lambda: run(vm.run_for_stdio("true")))
            for _ in range(COMMANDS)
        ]
        row('run_for_stdio("true")', times, "ms", "< 15 ms")
        heading(f"{STREAM // MIB} MiB through cat, in and out at once")
        rates = [STREAM / MIB / run(through_cat(vm, STREAM)) for _ in range(5)]
        row("each way", rates, "MiB/s", "> 30 MiB/s")
        heading("Concurrent commands, each with its own output")
        times = [seconds(lambda: run(concurrent(vm, CONCURRENT))) for _ in range(3)]
        row(f"{CONCURRENT} at once", times)
        run(vm.kill())


if __name__ == "__main__":
    main()
