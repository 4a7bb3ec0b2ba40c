"""The socket: the protocol, the lock, and clients that behave badly."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import logging
import random
import socket
import tracemalloc

import hostility
import pytest
from memory_machine import MIB, trial

from qubes_itests.core.vm.start_memory import memory_for_start
from qubes_itests.exc import HarnessError
from qubes_itests.qmemman.client import Client
from qubes_itests.qmemman.policy import DEFAULT_POLICY
from qubes_itests.qmemman.protocol import Balloon, SetMemory, parse_request
from qubes_itests.qmemman.server import Server
from qubes_itests.qmemman.simulation import virtual_time
from qubes_itests.qmemman.sizes import KIB


async def _ask(path, data):
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(data)
        return await reader.readline(), writer
    except BaseException:
        writer.close()
        raise


def test_requests():
    assert parse_request(b"400\n") == Balloon(400)
    assert parse_request(b"0:400 7:0\n") == SetMemory((("0", 400), ("7", 0)))
    for bad in (b"", b"-1", b"1 2", b"1:2 3", b"1:2 1:3", b"x", b"%d" % 2**70, b"1:-2"):
        assert parse_request(bad) is None


def test_answers(tmp_path):
    async def program():
        async with trial(tmp_path) as t:
            guest = await t.start("vm", 400, 1000, 300)
            await asyncio.sleep(5)
            for data, expected in (
                (b"1048576\n", b"OK\n"),
                (b"99999999999999\n", b"FAIL\n"),
                (b"many\n", b"INVALID_ARG\n"),
                (b"1:%d\n" % (600 * MIB), b"OK\n"),
                (b"1:0\n", b"OK\n"),
                (b"1:%d\n" % MIB, b"FAIL\n"),
                (b"99:0\n", b"FAIL\n"),
                (b"READY\n", b"OK\n"),
            ):
                answer, writer = await _ask(t.path, data)
                assert answer == expected, data
                writer.close()
            assert guest.squeezed == 0
            answer, writer = await _ask(t.path, b"STATUS\n")
            writer.close()
            status = json.loads(answer)
            assert status["domains"]["1"]["name"] == "vm"

    virtual_time.run(program())


def test_the_lock_is_held_until_the_client_closes(tmp_path):
    async def program():
        async with trial(tmp_path) as t:
            answer, first = await _ask(t.path, b"1000000\n")
            assert answer == b"OK\n"
            waiting = asyncio.create_task(_ask(t.path, b"1000000\n"))
            vanished = asyncio.create_task(_ask(t.path, b"1000000\n"))
            await asyncio.sleep(1)
            vanished.cancel()
            first.write(b"5000000\n")
            await asyncio.sleep(30)
            assert not waiting.done()
            first.close()
            answer, second = await waiting
            assert answer == b"OK\n"
            # one that never closes is put out after ten minutes
            answer, third = await _ask(t.path, b"1000000\n")
            assert answer == b"OK\n"
            second.close()
            third.close()

    virtual_time.run(program())


def test_who_does_not_read_its_answer_is_put_out(tmp_path):
    """Nothing of the answer is kept for it."""

    async def program():
        async with trial(tmp_path) as t:
            t.server.status = lambda: {"long": "x" * (8 * MIB)}
            reader, writer = await asyncio.open_unix_connection(t.path, limit=1024)
            writer.write(b"STATUS\n")
            await asyncio.sleep(11)
            assert len(await reader.read(-1)) < 8 * MIB
            writer.close()

    virtual_time.run(program())


def test_one_daemon_per_socket(tmp_path):
    async def program():
        async with trial(tmp_path) as t:
            with pytest.raises(HarnessError, match=r"qmemman\.sock is served already"):
                async with Server(t.balancer, t.path):
                    pass
            await t.client.status()
        with pytest.raises(HarnessError, match="is it running"):
            await Client(t.path).status()
        # a dead daemon's socket is no obstacle
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(t.path))
        async with Server(t.balancer, t.path):
            await t.client.status()

    virtual_time.run(program())


def test_hostile_requests_and_reports(tmp_path):
    """3,000 of them: afterwards the daemon balances as before, and is no larger."""
    chance = random.Random(7)  # noqa: S311 - not for secrets

    async def program():
        async with trial(tmp_path) as t:
            victim = await t.start("victim", 400, 2000, 250)
            bad = await t.start("bad", 400, 600, 250)
            sizes = []
            for _ in range(30):
                await asyncio.gather(
                    *(hostility.act(chance, t.path, bad.report) for _ in range(100))
                )
                await asyncio.sleep(11)
                gc.collect()
                sizes.append(tracemalloc.get_traced_memory()[0])
            # the first thousand fill caches
            assert max(sizes[10:]) - sizes[10] < 64 * KIB, sizes
            await asyncio.sleep(30)
            victim.use(1100 * MIB)
            await t.until(lambda: t.target(victim) >= 1400)
            assert t.target(bad) <= 600
            await t.start("late", 200, 400, 50)
            # nothing is kept of them
            assert len(t.server.clients) <= 1
            assert t.balancer._reports.keys() <= t.machine.guests.keys()

    # pytest keeps what is logged
    logging.disable(logging.CRITICAL)
    tracemalloc.start()
    try:
        virtual_time.run(program())
    finally:
        tracemalloc.stop()
        logging.disable(logging.NOTSET)


def test_what_a_start_asks_for():
    assert memory_for_start(400, vcpus=2, virt_mode="pv") == 407 * MIB
    assert memory_for_start(400, vcpus=2, maxmem=4000) == 407 * MIB + 4000 * 8192
    assert memory_for_start(400, vcpus=2) == 407 * MIB + 400 * 8192


def test_the_log_level_decides_what_the_daemon_says(tmp_path, caplog):
    """At 20 there is a line for each domain of each decision; by default none."""

    async def program(level):
        policy = dataclasses.replace(DEFAULT_POLICY, log_level=level)
        async with trial(tmp_path, policy=policy) as t:
            await t.start("vm", 400, 2000, 250)
            await asyncio.sleep(5)

    virtual_time.run(program(30))
    assert caplog.messages == []
    virtual_time.run(program(20))
    (line,) = [line for line in caplog.messages if line.startswith("balance vm:")][:1]
    for number in ("last_target=", "used=", "actual=", "no_progress=", "slow_memset_"):
        assert number in line
    assert logging.getLogger("qubes_itests.qmemman").level == logging.NOTSET
