"""How many requests of the Admin API a second, how soon, and what wrong ones do.

Run: ``.venv/bin/python tests/benchmarks/admin.py [--mutations N] [--seed N]``

The server has one core, the clients the others.  With ``--mutations`` that many mutated
requests are sent too (the documents quote 100,000); the exit status is 1 when one is
not answered as the protocol says, fails unexpectedly, or is refused and changes
something.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import select
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from admin_client import Client, frame
from admin_mutations import complaint, exchange, mutated, state_of
from bench import heading, row

from qubes_itests.admin.server import AdminServer
from qubes_itests.core.app import Qubes
from qubes_storage.reflink import ReflinkPool

CLIENTS = 10
REQUESTS = 1000
SLOW = 100


async def make_app(directory, count):
    """Return an app of that many VMs; few of them have volumes on the disk."""
    app = Qubes(hypervisor=None, directory=directory)
    pool = ReflinkPool(name="default", dir_path=directory / "pool", setup_check=False)
    await app.add_pool(pool)
    app.default_template = app.add_new_vm("TemplateVM", name="tiny", label="black")
    small = {"root": {"size": 1 << 20}, "private": {"size": 4 << 20}}
    await app.default_template.create_on_disk()
    work = app.add_new_vm("AppVM", name="work", label="red", volume_config=small)
    await work.create_on_disk()
    for number in range(count):
        app.add_new_vm("AppVM", name=f"vm{number}", label="red")
    return app


async def serve(directory, count, ready):
    app = await make_app(directory, count)
    async with AdminServer(app, directory / "qubesd.sock"):
        os.write(ready, b".")
        await asyncio.Event().wait()


@contextlib.contextmanager
def served(count):
    """Serve an app of that many VMs in a process and on a core of its own."""
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        wait, ready = os.pipe()
        child = os.fork()
        if not child:
            os.sched_setaffinity(0, cores[:1])
            logging.getLogger("qubes").addHandler(logging.NullHandler())
            asyncio.run(serve(Path(name), count, ready))
        os.close(ready)
        if not os.read(wait, 1):
            sys.exit("the server did not start")
        os.sched_setaffinity(0, cores[1:] or cores)
        try:
            yield Path(name) / "qubesd.sock", child
        finally:
            os.kill(child, 9)
            os.waitpid(child, 0)
            os.sched_setaffinity(0, cores)


def cpu_seconds(process):
    """Return the CPU time that a process has had."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Asking:
    """One client: asks again as soon as it is answered."""

    REQUEST = frame("admin.vm.property.Get", "vm7", "memory")

    def __init__(self, path, poll):
        self.path, self.poll = str(path), poll
        self.times = []
        self.ask()

    def ask(self):
        self.start = time.perf_counter()
        self.answer = b""
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(self.path)
        self.socket.sendall(self.REQUEST)
        self.socket.shutdown(socket.SHUT_WR)
        self.poll.register(self.socket, select.EPOLLIN)

    def listen(self):
        if data := self.socket.recv(65536):
            self.answer += data
            return
        self.times.append(time.perf_counter() - self.start)
        assert self.answer.startswith(b"0\0default="), self.answer
        self.poll.unregister(self.socket)
        self.socket.close()
        if len(self.times) < REQUESTS:
            self.ask()


def hammer(path, server):
    """Print what many requests at once take."""
    used, start = cpu_seconds(server), time.perf_counter()
    with select.epoll() as poll:
        clients = [Asking(path, poll) for _ in range(CLIENTS)]
        while asking := {
            each.socket.fileno(): each for each in clients if each.socket.fileno() >= 0
        }:
            for descriptor, _ in poll.poll():
                asking[descriptor].listen()
    times = sorted(t for each in clients for t in each.times)
    rate = len(times) / (time.perf_counter() - start)
    row("requests", [rate], unit="1/s", bound="> 2,000")
    row("each", [1000 * each for each in times], unit="ms")
    row("p99", [1000 * times[int(0.99 * len(times))]], unit="ms", bound="< 20")
    used = (cpu_seconds(server) - used) / len(times)
    row("the server's CPU time for each", [1_000_000 * used], unit="us", bound="< 500")


@contextlib.contextmanager
def slow_clients(path):
    """Clients that send half a request, and some that read no events."""
    with contextlib.ExitStack() as stack:
        for number in range(SLOW):
            slow = stack.enter_context(socket.socket(socket.AF_UNIX))
            slow.connect(str(path))
            if number % 2:
                slow.sendall(frame("admin.Events"))
                slow.shutdown(socket.SHUT_WR)
            else:
                slow.sendall(b"admin.vm.List+ do")
        yield


def speed():
    with served(1000) as (path, server):
        heading(f"admin.vm.property.Get, {CLIENTS} clients at once, 1,000 VMs")
        hammer(path, server)
        heading(f"the same, beside {SLOW} clients that neither send nor read")
        with slow_clients(path):
            hammer(path, server)
        heading("1,000 VMs")
        for method in ("admin.vm.List", "admin.vm.property.GetAll"):
            times = []
            for _ in range(100):
                start = time.perf_counter()
                Client(path).call(method, "vm7" if "All" in method else "dom0")
                times.append(1000 * (time.perf_counter() - start))
            row(method, times, unit="ms", bound="< 20" if "List" in method else "")


class Failures(logging.Handler):
    """Counts the records that tell of defects."""

    def __init__(self):
        super().__init__(logging.ERROR)
        self.count = 0

    def emit(self, record):
        self.count += 1
        print(record.getMessage(), file=sys.stderr)


def mutations(count, seed):
    """Send mutated requests; return how many were not treated as they should be."""
    failures = Failures()
    logging.getLogger().addHandler(failures)
    logging.getLogger("qubes").addHandler(logging.NullHandler())
    logging.getLogger("qubes").setLevel(logging.ERROR)
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    def run(coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result()

    kinds = {"closed": 0, "answered": 0, "refused": 0}
    wrong = 0
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        app = run(make_app(Path(name), 0))
        server = AdminServer(app, Path(name) / "qubesd.sock")
        run(server.__aenter__())
        before = state_of(app)
        start = time.perf_counter()
        for data in mutated(count, seed):
            answer = exchange(server.path, data)
            said, after = complaint(data, answer), state_of(app)
            refused = not answer.startswith((b"0\0", b"1\0"))
            if refused and after != before:
                said = said or "it was refused, and changed something"
            if said:
                wrong += 1
                print(f"{said}: {data!r} {answer!r}", file=sys.stderr)
            before = after
            kind = "closed" if not answer else "refused" if refused else "answered"
            kinds[kind] += 1
        rate = count / (time.perf_counter() - start)
        run(server.__aexit__(None, None, None))
    heading(f"{count} mutated requests, seed {seed}")
    row("requests", [rate], unit="1/s")
    for kind, number in kinds.items():
        row(kind, [number], unit="")
    row("not as they should be", [wrong], unit="", bound="0")
    row("records of defects in the log", [failures.count], unit="", bound="0")
    return wrong + failures.count


def main():
    """Measure, print and judge."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mutations", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    speed()
    if options.mutations:
        sys.exit(bool(mutations(options.mutations, options.seed)))


if __name__ == "__main__":
    main()
