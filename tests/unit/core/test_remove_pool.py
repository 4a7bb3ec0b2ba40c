"""Pools come once, and go when nobody uses them any more."""

import asyncio

import pytest

from qubes_itests.core.exc import (
    QubesPoolInUseError,
    QubesPoolNotFoundError,
    QubesValueError,
)
from qubes_storage.exc import StoragePoolException
from qubes_storage.file import FilePool


def test_a_pool_that_nobody_uses_is_forgotten_with_its_files_left(app, tmp_path):
    second = FilePool(name="second", dir_path=tmp_path / "second")
    heard = []
    app.add_handler("pool-*", lambda _app, event, **_: heard.append(event))

    async def run():
        await app.add_pool(second)
        (tmp_path / "second" / "kept").touch()
        await app.remove_pool("second")

    asyncio.run(run())
    assert list(app.pools) == ["default"]
    assert (tmp_path / "second" / "kept").exists()
    assert heard == ["pool-add", "pool-pre-delete", "pool-delete"]


def test_a_pool_in_use_stays_and_its_users_are_named(app, template):
    with pytest.raises(QubesPoolInUseError, match=f"VM {template}.*default_pool"):
        asyncio.run(app.remove_pool("default"))
    assert list(app.pools) == ["default"]
    with pytest.raises(QubesPoolNotFoundError):
        asyncio.run(app.remove_pool("no-such"))


def gathered(*coroutines):
    """Run at once; return errors in place of results."""

    async def gather():
        return await asyncio.gather(*coroutines, return_exceptions=True)

    return asyncio.run(gather())


def test_of_two_that_add_a_pool_at_once_one_does(app, tmp_path):
    pools = [FilePool(name="second", dir_path=tmp_path / name) for name in ("a", "b")]
    results = gathered(*map(app.add_pool, pools))
    added, refused = sorted(results, key=lambda each: isinstance(each, Exception))
    assert app.pools["second"] is added
    assert isinstance(refused, QubesValueError)


def test_of_two_that_remove_a_pool_at_once_one_does(app, tmp_path):
    pool = FilePool(name="second", dir_path=tmp_path / "second")
    asyncio.run(app.add_pool(pool))
    results = gathered(app.remove_pool("second"), app.remove_pool("second"))
    assert {type(each) for each in results} == {type(None), QubesPoolNotFoundError}
    assert list(app.pools) == ["default"]


def test_a_pool_that_cannot_be_forgotten_stays(app, tmp_path):
    class Stubborn(FilePool):
        async def destroy(self):
            raise StoragePoolException("it is busy")

    asyncio.run(app.add_pool(Stubborn(name="second", dir_path=tmp_path / "second")))
    with pytest.raises(StoragePoolException):
        asyncio.run(app.remove_pool("second"))
    assert "second" in app.pools


def test_nobody_begins_to_use_a_pool_that_is_being_forgotten(app, tmp_path):
    class Watched(FilePool):
        async def destroy(self):
            assert self.name not in app.pools
            await super().destroy()

    asyncio.run(app.add_pool(Watched(name="second", dir_path=tmp_path / "second")))
    asyncio.run(app.remove_pool("second"))
