"""Calls whose callers vanish, at whatever await: volumes are free, and whole."""

from __future__ import annotations

import asyncio

import pytest
from cancelling import cancelled_everywhere

from qubes_itests.admin.dispatch import Dispatcher
from qubes_itests.admin.methods import METHODS
from qubes_itests.admin.protocol import Request
from qubes_itests.serve.imports import import_volume
from qubes_storage.uninterrupted import to_its_end

MIB = 1 << 20


@pytest.fixture
def work(app):
    return app.domains["work"]


@pytest.fixture
def cancelled(run, work):
    """Run something until it was cancelled at each of its waits; nothing may be held.

    :return: how often that was, and the events of imports.
    """
    events = []
    for name in ("begin", "end"):
        work.add_handler(
            f"domain-volume-import-{name}", lambda *a, **_k: events.append(a[1])
        )

    async def free():
        for volume in work.volumes.values():
            assert not volume.pool.state(volume.vid).is_used()
            assert not volume.pool.state(volume.vid).is_exported()
            if volume.save_on_stop:
                assert not volume.files.imported.exists()
        await work.storage.start()
        await work.storage.stop()
        assert events.count("domain-volume-import-begin") == events.count(
            "domain-volume-import-end"
        )

    return lambda make: run(cancelled_everywhere(make, free))


def call(app, method, argument, payload=b""):
    async def made():
        request = Request(method, argument, "dom0", "work", payload)
        assert await Dispatcher(app, METHODS).answer(request) == b"0\0"

    return made


@pytest.mark.parametrize(
    ("method", "payload"),
    [
        ("admin.vm.volume.ImportWithSize", b"%d\n" % MIB + bytes(MIB)),
        ("admin.vm.volume.Clear", b""),
    ],
)
def test_imports_of_the_admin_api(app, cancelled, method, payload):
    assert cancelled(call(app, method, "private", payload)) > 9


def test_imports_that_come_as_streams(app, cancelled):
    async def stream():
        for part in (b"%d\n" % MIB, bytes(MIB // 2), b"x" * (MIB // 2)):
            await asyncio.sleep(0)
            yield part

    async def make():
        method = "admin.vm.volume.ImportWithSize"
        reply = await import_volume(app, "work", "private", method, stream())
        assert reply == b"0\0"

    assert cancelled(make) > 20


def test_copies_of_volumes(app, cancelled):
    async def clone():
        dispatcher = Dispatcher(app, METHODS)
        reply = await dispatcher.answer(
            Request("admin.vm.volume.CloneFrom", "private", "dom0", "tiny", b"")
        )
        token = reply.removeprefix(b"0\0")
        reply = await dispatcher.answer(
            Request("admin.vm.volume.CloneTo", "private", "dom0", "work", token)
        )
        assert reply == b"0\0"

    assert cancelled(clone) > 5


def test_starts_of_storage(cancelled, work):
    """One that was cancelled has stopped what it had started."""

    async def start():
        await work.storage.start()
        await to_its_end(work.storage.stop())

    assert cancelled(start) > 9
