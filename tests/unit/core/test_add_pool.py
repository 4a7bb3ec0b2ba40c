"""Pools are added as objects, or made by the name of their driver."""

import asyncio

import pytest

from qubes_itests.core.exc import QubesValueError
from qubes_storage.exc import DriverNotFoundError
from qubes_storage.file import FilePool


def add(app, **options):
    return asyncio.run(app.add_pool(**options))


def test_a_pool_is_made_by_the_driver_that_is_named(app, tmp_path):
    """As suites of the core write it."""
    pool = add(app, name="second", driver="file", dir_path=str(tmp_path / "second"))
    assert type(pool) is FilePool
    assert pool is app.pools["second"]
    assert (tmp_path / "second").is_dir()


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"name": "x", "driver": "floppy"}, DriverNotFoundError, "'floppy'"),
        ({"name": "x"}, DriverNotFoundError, "no storage driver ''"),
        ({"name": "x", "driver": "file", "sides": 2}, QubesValueError, "sides"),
        ({"driver": "file", "dir_path": "/nowhere"}, QubesValueError, "name"),
        (
            {"name": "default", "driver": "file", "dir_path": "/nowhere"},
            QubesValueError,
            "already",
        ),
    ],
)
def test_what_cannot_be_made_is_said_and_adds_nothing(app, options, error, said):
    before = dict(app.pools)
    with pytest.raises(error, match=said):
        add(app, **options)
    assert app.pools == before
