"""The conformance suite of storage drivers.

Authors of drivers run it against pools of their drivers, from the command line::

    pytest -p qubes_itests --pyargs qubes_itests.conformance.storage \
        --qubes-storage-driver=my-driver --pool-config dir_path={directory}/pool

or, to be in charge of how a pool is made, from a test module::

    from qubes_itests.conformance.storage import StorageConformance

    class TestMyDriver(StorageConformance):
        def make_pool(self, name, directory):
            return MyPool(name=name, dir_path=directory / "pool")

Every test runs on every filesystem.  What the driver cannot do it has to declare, by
the attribute `lacks` of the class here or of its pool, or by ``--qubes-storage-lacks``;
the same tests then prove that it refuses.  A table of all this ends the run.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from qubes_itests.conformance._content import (
    ResizeTests,
    RevisionTests,
    TransferTests,
)
from qubes_itests.conformance._durability import AccountTests, CrashTests, ErrorTests
from qubes_itests.conformance._faults import FaultTests, Opener
from qubes_itests.conformance._life import KindTests, LifeTests
from qubes_itests.conformance.features import FEATURES, LACKABLE, check_lacks
from qubes_itests.conformance.options import (
    DIRECTORY,
    LACKS,
    driver_name,
    lacks,
    pool_config,
)
from qubes_itests.conformance.trial import Trial
from qubes_storage import pool_class
from qubes_storage.exc import DriverNotFoundError
from qubes_storage.ficlone import supports_reflink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from qubes_storage import Pool

__all__ = ["FEATURES", "LACKABLE", "StorageConformance", "TestStorageDriver"]


class StorageConformance(
    LifeTests,
    KindTests,
    RevisionTests,
    ResizeTests,
    TransferTests,
    CrashTests,
    FaultTests,
    AccountTests,
    ErrorTests,
):
    """Every test of the contract of pools and volumes, on every filesystem.

    Subclass it under a name that begins with ``Test``, and define `make_pool`.
    """

    #: Fixtures that give the directories to run on; empty for pools that have their
    #: storage elsewhere, `make_pool` gets None then.
    filesystems: ClassVar[tuple[str, ...]] = ("btrfs", "xfs", "xfs_no_reflink", "ext4")

    #: Those of them on which space runs out, and the power is cut.
    fault_filesystems: ClassVar[tuple[str, ...]] = ("btrfs", "xfs", "ext4")

    #: Features, of `LACKABLE`, that the driver does not have.  The class of its pool
    #: may have such an attribute as well; both count.
    lacks: ClassVar[frozenset[str]] = frozenset()

    def make_pool(self, name: str, directory: Path | None) -> Pool:
        """Return an object of the pool under test, not set up.

        It is called several times in a test, and every call with the same arguments
        has to return another object of the same pool.

        :param name: name of the pool.
        :param directory: a directory on the filesystem under test, empty when a test
            begins.
        """
        raise NotImplementedError

    def pool_class(self, driver: str) -> Callable[..., Pool]:
        """Return what makes a pool of a driver, as a server does it.

        :param driver: its name, as the configuration of a pool has it.
        """
        return pool_class(driver)

    @classmethod
    def parameters(cls, config: pytest.Config) -> tuple[str, ...]:
        """Return the filesystems that tests are run on, as the table calls them."""
        del config
        return cls.filesystems or ("own",)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run every test on every filesystem."""
        if "filesystem" in metafunc.fixturenames:
            names: Sequence[Any] = self.parameters(metafunc.config)
            if "opener" in metafunc.fixturenames:
                reason = f"it is tested on {', '.join(self.fault_filesystems)} only"
                skipped = pytest.param(names[0], marks=pytest.mark.skip(reason=reason))
                names = [n for n in names if n in self.fault_filesystems] or [skipped]
            metafunc.parametrize("filesystem", names, scope="function")

    @pytest.fixture
    def trial(self, filesystem: str, request: pytest.FixtureRequest) -> Iterator[Trial]:
        """Return the pool under test, set up and empty."""
        own = filesystem == "own"
        directory = None if own else request.getfixturevalue(filesystem)
        with asyncio.Runner() as runner:
            trial = Trial(
                lambda: self._open_pool(request, directory), self.pool_class, runner
            )
            request.node.stash[LACKS] = self._lacks_of(trial.pool, request, directory)
            yield trial
            trial.clean_up()

    @pytest.fixture
    def opener(
        self, request: pytest.FixtureRequest, tmp_path: Path
    ) -> Iterator[Opener]:
        """Return what opens pools under test, in any directory."""
        pool = self._open_pool(request, tmp_path)
        known = self._lacks_of(pool, request, None)
        request.node.stash[LACKS] = known
        with asyncio.Runner() as runner:
            yield Opener(lambda path: self._open_pool(request, path), runner, known)

    def _lacks_of(
        self, pool: Pool, request: pytest.FixtureRequest, directory: Path | None
    ) -> frozenset[str]:
        del request
        names = self.lacks | getattr(type(pool), "lacks", frozenset())
        if directory is not None and not supports_reflink(directory):
            names |= {"shared_extents"}
        return check_lacks(names)

    def _open_pool(
        self, request: pytest.FixtureRequest, directory: Path | None
    ) -> Pool:
        del request
        return self.make_pool("conformance", directory)


class TestStorageDriver(StorageConformance):
    """The suite for the driver and the pool that the command line names."""

    @classmethod
    def parameters(cls, config: pytest.Config) -> tuple[str, ...]:
        """Return the filesystems, if the pool's configuration asks for a directory."""
        _driver(config)
        values = pool_config(config).values()
        needed = any(DIRECTORY in str(value) for value in values)
        return cls.filesystems if needed else ("own",)

    def _lacks_of(
        self, pool: Pool, request: pytest.FixtureRequest, directory: Path | None
    ) -> frozenset[str]:
        known = super()._lacks_of(pool, request, directory)
        return check_lacks(known | lacks(request.config))

    def _open_pool(
        self, request: pytest.FixtureRequest, directory: Path | None
    ) -> Pool:
        settings: dict[str, Any] = {
            key: value.replace(DIRECTORY, str(directory))
            if isinstance(value, str)
            else value
            for key, value in pool_config(request.config).items()
        }
        return _driver(request.config)(name="conformance", **settings)


def _driver(config: pytest.Config) -> type[Pool]:
    name = driver_name(config)
    if name is None:
        raise pytest.UsageError("name a storage driver: --qubes-storage-driver=NAME")
    try:
        return pool_class(name)
    except DriverNotFoundError as error:
        raise pytest.UsageError(str(error)) from None
