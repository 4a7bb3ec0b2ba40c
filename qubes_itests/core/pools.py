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
from qubes_itests.core.properties import Property, PropertyHolder
from qubes_storage import Pool, driver_names, operation, pool_class
from qubes_storage.drivers import driver_parameters

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qubes_itests.core.domains import VMCollection
    from qubes_itests.core.store.file import StoreFile
    from qubes_storage import Volume

__all__ = ["Pool", "PoolsMixin", "driver_names", "driver_options"]


def driver_options(driver: str) -> tuple[str, ...]:
    """Return the names of what `PoolsMixin.add_pool` takes for a driver, sorted.

    :raise DriverNotFoundError: when there is no such driver.
    """
    return tuple(sorted(driver_parameters(driver)))


def _app_pool(app: PoolsMixin, prop: Property[Any], value: Any) -> Pool | None:
    del prop
    if value in (None, ""):
        return None
    try:
        return app.get_pool(value)
    except QubesPoolNotFoundError as error:
        # as a refusal, as of any other value that the property does not take
        raise ValueError(str(error)) from None


def _default_pool(kind: str) -> Property[Pool | None]:
    return Property["Pool | None"](
        f"default_pool_{kind}",
        allow_none=True,
        setter=_app_pool,
        load_stage=3,
        default=lambda app: app.default_pool,
        doc=f"The pool of {kind} volumes that name none.",
    )


class PoolsMixin(PropertyHolder):
    """What an app needs to have storage pools."""

    domains: VMCollection
    #: Where its state is kept; None for an app that lasts no longer than its run.
    store: StoreFile | None
    #: The pools, by name.
    pools: dict[str, Pool]
    #: Pool and id of volumes that no VM has and that are being removed.
    volumes_going: set[tuple[str, str]]

    default_pool: Property[Pool | None] = Property(
        "default_pool",
        allow_none=True,
        setter=_app_pool,
        load_stage=3,
        default=lambda app: next(iter(app.pools.values()), None),
        doc="The pool of volumes that name none.",
    )
    default_pool_root = _default_pool("root")
    default_pool_private = _default_pool("private")
    default_pool_volatile = _default_pool("volatile")
    default_pool_kernel = _default_pool("kernel")

    def default_pool_of(self, volume: str) -> Pool | None:
        """Return the pool of a volume that names none, by what it is in its VM."""
        pools: dict[str, Pool | None] = {
            "root": self.default_pool_root,
            "private": self.default_pool_private,
            "volatile": self.default_pool_volatile,
            "kernel": self.default_pool_kernel,
        }
        return pools.get(volume, self.default_pool)

    async def add_pool(
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
        self._check_new_pool(pool)
        await pool.setup()
        # Checked again below: another call may have added the name during the await.
        try:
            # An app that lasts no longer than a test leaves filesystems to the test.
            if self.store is not None:
                await pool.claim()
            self._check_new_pool(pool)
        except BaseException:
            await pool.destroy()
            raise
        self.pools[pool.name] = pool
        self.fire_event("pool-add", pool=pool)
        return pool

    def _check_new_pool(self, pool: Pool) -> None:
        if pool.name in self.pools:
            raise QubesValueError(f"there is a pool {pool.name!r} already")

    async def remove_pool(self, name: str) -> None:
        """Forget a storage pool; what is in it stays.

        :raise QubesPoolInUseError: when a VM has a volume in it, or it is a default.
        """
        pool = self.get_pool(name)
        users = [
            f"VM {vm}"
            for vm in self.domains
            if any(v.pool is pool for v in vm.volumes.values())
        ]
        users += [
            f"the app ({prop.name})"
            for prop in self.property_list()
            if prop.name.startswith("default_pool") and getattr(self, prop.name) is pool
        ]
        if users:
            raise QubesPoolInUseError(
                name, f"pool {name!r} is used by {', '.join(users)}; change these first"
            )
        self.fire_event("pool-pre-delete", pre_event=True, pool=pool)
        # Before the await: meanwhile no VM may begin to use it, nor another call remove
        # it too.
        del self.pools[name]
        try:
            await pool.destroy()
        except BaseException:
            self.pools.setdefault(name, pool)
            raise
        self.fire_event("pool-delete", pool=pool)

    def owned_volumes(self, *, besides: object = None) -> set[tuple[str, str]]:
        """Return pool and id of each volume that a VM has, on disk or not.

        :param besides: a VM that does not count.
        """
        return {
            (volume.pool.name, volume.vid)
            for vm in self.domains
            if vm is not besides
            for volume in vm.volumes.values()
        }

    async def find_orphans(self, pool: Pool, *, besides: object = None) -> list[str]:
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

    def get_pool(self, pool: Pool | str) -> Pool:
        """Return a storage pool by itself or its name.

        :raise QubesPoolNotFoundError: when there is none of that name.
        """
        name = str(pool)
        if name not in self.pools:
            raise QubesPoolNotFoundError(name, self.pools)
        return self.pools[name]


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
