"""Pools go when nobody uses them any more."""

import asyncio

import pytest

from qubes_itests.core.exc import QubesPoolInUseError, QubesPoolNotFoundError
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
