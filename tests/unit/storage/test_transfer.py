"""Imports and exports end whenever their users are cancelled, at whatever await."""

from __future__ import annotations

import asyncio

import pytest
from cancelling import cancelled_everywhere

from qubes_storage import Import, exporting
from qubes_storage.exc import VolumeStateError
from qubes_storage.uninterrupted import to_its_end

SIZE = 64 * 1024


@pytest.fixture
def volume(shop):
    volume = shop.volume()
    shop.run(volume.create())
    return volume


async def nothing_is_held(volume):
    """Everything that an import or an export in progress would refuse, and no file."""
    assert not volume.files.imported.exists()
    await volume.start()
    await volume.stop()
    await volume.resize(volume.size)
    assert not volume.pool.state(volume.vid).is_exported()
    assert not volume.pool.state(volume.vid).is_used()


def fill(path, content=b"new"):
    assert path.exists(), "the import has ended before its thread"
    path.write_bytes(content.ljust(SIZE, b"\0"))
    assert path.exists(), "the import has ended before its thread"


def test_an_import_that_is_cancelled_leaves_the_volume_free(shop, volume):
    async def replace():
        async with Import(volume) as path:
            await to_its_end(asyncio.to_thread(fill, path))
            await asyncio.sleep(0)

    async def main():
        count = await cancelled_everywhere(replace, lambda: nothing_is_held(volume))
        assert count >= 9, "it begins, is filled, and ends, each of them three times"
        await replace()

    shop.run(main())
    assert shop.read(volume.files.clean, 3) == b"new"


def test_an_export_that_is_cancelled_leaves_the_volume_free(shop, volume):
    async def read():
        async with exporting(volume) as path:
            await asyncio.to_thread(path.read_bytes)

    async def main():
        count = await cancelled_everywhere(read, lambda: nothing_is_held(volume))
        assert count >= 9

    shop.run(main())


def test_copying_a_volume_is_cancelled_with_both_free(shop, volume):
    other = shop.volume(vm="other")
    shop.run(other.create())

    async def check():
        await nothing_is_held(volume)
        await nothing_is_held(other)

    async def main():
        copying = lambda: volume.import_volume(other)  # noqa: E731
        assert await cancelled_everywhere(copying, check) >= 6

    shop.run(main())


def test_a_body_that_fails_changes_nothing(shop, volume):
    shop.session(volume, b"old")

    transfer = Import(volume)

    async def replace():
        async with transfer as path:
            fill(path)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        shop.run(replace())
    assert not transfer.committed
    assert shop.read(volume.files.clean, 3) == b"old"
    shop.run(nothing_is_held(volume))


def test_what_came_of_an_import_is_known_although_its_user_was_cancelled(shop, volume):
    """Too late to be dropped: the content is the new one, and that is said."""

    async def main():
        transfer = Import(volume)
        path = await transfer.__aenter__()
        fill(path)
        ending = asyncio.ensure_future(transfer.__aexit__(None))
        await asyncio.sleep(0)
        ending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await ending
        assert transfer.committed

    shop.run(main())
    assert shop.read(volume.files.clean, 3) == b"new"


def test_an_import_that_is_refused_ends_no_other(shop, volume):
    async def main():
        async with Import(volume) as path:
            with pytest.raises(VolumeStateError, match="import is under way"):
                async with Import(volume):
                    pytest.fail("there is one already")
            assert path.exists()

    shop.run(main())


def test_what_cannot_be_given_back_is_logged_and_the_cancellation_goes_on(caplog):
    async def acquire():
        await asyncio.sleep(0)
        return "it"

    async def fail(_it):
        raise OSError("stuck")

    async def main():
        task = asyncio.ensure_future(to_its_end(acquire(), undo=fail))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert "stuck" in caplog.text
