"""The storage pools of an app."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from qubes_itests import timeline
from qubes_itests.core.exc import (
    QubesPoolInUseError,
    QubesPoolNotFoundError,
    QubesValueError,
)
from qubes_storage import Pool, driver_names, operation, pool_class
from qubes_storage.drivers import driver_parameters

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qubes_itests.core.app import Qubes
    from qubes_itests.core.vm.base import BaseVM
    from qubes_storage import Volume

__all__ = ["Pool", "Pools", "driver_names", "driver_options"]


def driver_options(driver: str) -> tuple[str, ...]:
    """Return the names of what `Pools.add` takes for a driver, sorted.

    :raise DriverNotFoundError: when there is no such driver.
    """
    return tuple(sorted(driver_parameters(driver)))


class Pools(dict[str, Pool]):
    """The pools of one app, by name.

    :param app: events ``pool-add``, ``pool-pre-delete`` and ``pool-delete`` are fired
        on it.
    """

    def __init__(self, app: Qubes) -> None:
        super().__init__()
        self._app = app
        #: Pool and id of volumes that no VM has and that are being removed.
        self.volumes_going: set[tuple[str, str]] = set()

    def find(self, pool: Pool | str) -> Pool:
        """Return a pool by itself or its name.

        :raise QubesPoolNotFoundError: when there is none of that name.
        """
        name = str(pool)
        if name not in self:
            raise QubesPoolNotFoundError(name, self)
        return self[name]

    def default_of(self, volume: str) -> Pool | None:
        """Return the pool of a volume that names none, by what it is in its VM."""
        app = self._app
        pools = {
            "root": app.default_pool_root,
            "private": app.default_pool_private,
            "volatile": app.default_pool_volatile,
            "kernel": app.default_pool_kernel,
        }
        return pools.get(volume, app.default_pool)

    async def add(
        self, name: Pool | str | None = None, *, driver: str = "", **options: Any
    ) -> Pool:
        """Set up a storage pool, add it under its name, and return it.

        :param name: the pool, or the name of one that is made.
        :param driver: of the pool to make: ``file-reflink``, ``file`` …
        :param options: of that pool: what its driver takes.
        :raise DriverNotFoundError: when there is no such driver.
        :raise QubesValueError: for options that it does not take, or a name in use.
        :raise StoragePoolException: when it cannot be set up, or somebody else owns
            what is in it.
        """
        if name is None:
            raise QubesValueError("a pool is added by itself, or with a name")
        options = {"name": name, **options}
        if isinstance(name, str):
            cls: Any = pool_class(driver)
            try:
                pool: Pool = cls(**options)
            except TypeError as error:
                raise QubesValueError(f"driver {driver}: {error}") from None
        else:
            pool = name
        self._check_new(pool)
        await pool.setup()
        # Checked again below: another call may have added the name during the await.
        try:
            # An app that lasts no longer than a test leaves filesystems to the test.
            if self._app.store is not None:
                await pool.claim()
            self._check_new(pool)
        except BaseException:
            await pool.destroy()
            raise
        self[pool.name] = pool
        self._app.fire_event("pool-add", pool=pool)
        return pool

    def _check_new(self, pool: Pool) -> None:
        if pool.name in self:
            raise QubesValueError(f"there is a pool {pool.name!r} already")

    async def remove(self, name: str) -> None:
        """Forget a storage pool; what is in it stays.

        :raise QubesPoolInUseError: when a VM has a volume in it, or it is a default.
        """
        pool = self.find(name)
        users = [
            f"VM {vm}"
            for vm in self._app.domains
            if any(v.pool is pool for v in vm.volumes.values())
        ]
        users += [
            f"the app ({prop.name})"
            for prop in self._app.property_list()
            if prop.name.startswith("default_pool")
            and getattr(self._app, prop.name) is pool
        ]
        if users:
            raise QubesPoolInUseError(
                name, f"pool {name!r} is used by {', '.join(users)}; change these first"
            )
        self._app.fire_event("pool-pre-delete", pre_event=True, pool=pool)
        # Before the await: meanwhile no VM may begin to use it, nor another call remove
        # it too.
        del self[name]
        try:
            await pool.destroy()
        except BaseException:
            self.setdefault(name, pool)
            raise
        self._app.fire_event("pool-delete", pool=pool)

    def owned_volumes(self, *, besides: BaseVM | None = None) -> set[tuple[str, str]]:
        """Return pool and id of each volume that a VM has, on disk or not.

        :param besides: a VM that does not count.
        """
        return {
            (volume.pool.name, volume.vid)
            for vm in self._app.domains
            if vm is not besides
            for volume in vm.volumes.values()
        }

    async def find_orphans(
        self, pool: Pool, *, besides: BaseVM | None = None
    ) -> list[str]:
        """Return the ids of the volumes in a pool that no VM of the app has.

        Those that are being removed are none any more: no VM may take them over.

        :param besides: a VM that does not count.
        :raise StoragePoolException: when the pool cannot be read.
        """
        found = await pool.find_volumes()
        owned = self.owned_volumes(besides=besides) | self.volumes_going
        return [vid for vid in found if (pool.name, vid) not in owned]

    async def remove_orphan(self, pool: Pool, vid: str) -> None:
        """Remove a volume that no VM of the app has, with its revisions.

        :raise QubesValueError: when a VM has it, or there is none of that id.
        :raise VolumeError: when it cannot be removed.
        """
        if vid not in await self.find_orphans(pool):
            raise QubesValueError(
                f"pool {pool} has no volume {vid!r} without a VM: see its orphans"
            )
        await self.remove_unowned(pool, vid)

    async def remove_unowned(self, pool: Pool, vid: str) -> None:
        """Remove a volume unless a VM has it; no error when there is nothing of it.

        :raise QubesValueError: when a VM has it.
        :raise VolumeError: when it cannot be removed.
        """
        if (pool.name, vid) in self.owned_volumes():
            raise QubesValueError(f"a VM has volume {vid!r} of pool {pool}")
        config = {"vid": vid, "name": vid.rpartition("/")[2]}
        volume = pool.init_volume(None, config)
        # Until it is gone it counts as no orphan, so that no VM adopts it meanwhile.
        self.volumes_going.add((pool.name, vid))
        try:
            await volume.remove()
        except BaseException:
            pool.unbind(volume)
            raise
        finally:
            self.volumes_going.discard((pool.name, vid))


@contextlib.contextmanager
def _report(volume: Volume, action: str) -> Iterator[None]:
    """Report an operation on a volume in the timeline."""
    _, _, vm = volume.vid.rpartition("/")[0].rpartition("/")
    span = timeline.begin(
        "storage",
        vm or None,
        operation=action,
        pool=volume.pool.name,
        volume=volume.vid,
    )
    ok = False
    try:
        yield
        ok = True
    finally:
        span.end(ok=ok)


# The package of the drivers does not know the timeline.
operation.watch = _report
