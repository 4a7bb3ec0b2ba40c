"""Opening of an app from its store: all or nothing, with its pools set up."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from qubes_itests.core.exc import QubesException
from qubes_itests.core.store.document import no_collection, parse
from qubes_itests.core.store.file import StoreError
from qubes_itests.core.store.journal import recover
from qubes_itests.core.store.loading import Loading
from qubes_itests.core.vm.dispvm import DispVM
from qubes_storage.exc import StoragePoolException
from qubes_storage.reflink import ReflinkPool

if TYPE_CHECKING:
    from pathlib import Path

    from qubes_itests.core.app import Qubes
    from qubes_itests.core.store.file import StoreFile
    from qubes_storage.pool import Pool

__all__ = ["load_store", "open_copy", "open_store"]

log = logging.getLogger("qubes.store")


def load_store(app: Qubes, *, lock: bool = False) -> None:
    """Give a new app the state of its store, and do no more; this blocks.

    :param lock: whether to keep other writers out until the app is closed.
    :raise StoreError: says what is wrong with the file; the app is of no use then.
    """
    store = _begin(app)
    data = store.read(lock=lock)
    try:
        with no_collection():
            Loading(app, parse(data, store.path), store.path).run()
    except BaseException:
        store.release()
        raise
    _enable_events(app)
    for vm in app.domains:
        vm.fire_event("domain-load")


async def open_store(app: Qubes, *, lock: bool = False) -> None:
    """Give a new app the state of its store; ``domain-load`` is fired on each VM.

    Disposable VMs that should have been removed when they ended are removed, unless
    others use them.  A pool that cannot be set up stays and is noted in `problems`.

    :param lock: whether to keep other writers out until the app is closed, of the store
        and of its pools.  What an interrupted writer has left is put in order then.
    :raise StoreError: says what is wrong with the file, or which of its pools another
        owner has; the app is of no use then.
    """
    store = _begin(app)
    data = await asyncio.to_thread(store.read, lock=lock)
    try:
        with no_collection():
            root = await asyncio.to_thread(parse, data, store.path)
            Loading(app, root, store.path).run()
        for pool in app.pools.values():
            try:
                await pool.setup()
            except StoragePoolException as error:
                # a disk that is not plugged in must not keep the others from their use
                log.error("pool %s is not ready: %s", pool, str(error))  # noqa: TRY400
                app.problems.append(f"pool {pool} is not ready: {error}")
                continue
            if lock:
                await _claim(store, pool)
        _enable_events(app)
        if lock:
            await recover(app)
    except BaseException:
        for pool in app.pools.values():
            await pool.destroy()
        store.release()
        raise
    for vm in app.domains:
        if isinstance(vm, DispVM) and vm.auto_cleanup:
            await _remove(app, vm)
        else:
            vm.fire_event("domain-load")


async def open_copy(app: Qubes, data: bytes, source: Path, directory: Path) -> None:
    """Give a new app the state of another one, in pools of its own, which are empty.

    The document may be anybody's: of a pool only its name counts.  VMs stay that would
    be removed when their app is opened again.

    :param data: the document.
    :param source: where it is from, for errors.
    :param directory: for the pools, best on a filesystem with reflinks.
    :raise StoreFormatError: says what is wrong with it, and where.
    """
    app.events_enabled, app.loading = False, True
    app.domains["dom0"].events_enabled = False
    with no_collection():
        root = await asyncio.to_thread(parse, data, source)
        for number, pool in enumerate(root.grandchildren("pools", "pool")):
            pool.attributes = {
                "name": pool.attributes.get("name", ""),
                "driver": ReflinkPool.driver,
                "dir_path": str(directory / str(number)),
                "setup_check": "no",
            }
        Loading(app, root, source).run()
    for each in app.pools.values():
        await each.setup()
    _enable_events(app)


def _begin(app: Qubes) -> StoreFile:
    if app.store is None:
        raise QubesException("the app has no store to be loaded from")
    app.events_enabled, app.loading = False, True
    app.domains["dom0"].events_enabled = False
    return app.store


def _enable_events(app: Qubes) -> None:
    app.loading = False
    app.events_enabled = True
    for vm in app.domains:
        vm.events_enabled = True


async def _claim(store: StoreFile, pool: Pool) -> None:
    try:
        await pool.claim()
    except StoragePoolException as error:
        raise StoreError(
            store.path, f"{store.path} cannot be loaded: {error}"
        ) from error


async def _remove(app: Qubes, vm: DispVM) -> None:
    name = vm.name
    try:
        await app.domains.remove(vm)
    except QubesException as error:
        log.warning("disposable VM %s is kept: %s", name, str(error))
    else:
        log.info("disposable VM %s is gone: it ended with its last run", name)
