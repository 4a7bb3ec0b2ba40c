"""The storage of a VM and the pools of an app, called as suites of the core do."""

from __future__ import annotations

import asyncio

import pytest

from qubes_itests.core import exc
from qubes_itests.core.vm.life import PowerState

pytestmark = pytest.mark.asyncio


async def made(app, template, name):
    return await app.create_vm("AppVM", name=name, label="red", template=template)


async def test_a_volume_by_itself_and_by_name(app, template):
    await template.create_on_disk()
    work = await made(app, template, "work")
    private = work.volumes["private"]
    assert work.storage.get_volume("private") is private
    assert work.storage.get_volume(volume_or_name=private) is private
    fresh = {"rw": True, "save_on_stop": True, "size": 4096}
    added = work.storage.init_volume(name="more", volume_config=fresh)
    assert work.volumes["more"] is added
    await added.create()
    with pytest.raises(KeyError):
        work.storage.get_volume("none")
    assert await work.storage.verify()
    used = sum(volume.usage for volume in work.volumes.values())
    assert work.storage.get_disk_utilization() == used


async def test_volumes_keep_as_many_revisions_as_their_pool(app):
    """Those of templates too."""
    app.default_pool.revisions_to_keep = 4
    fresh = app.add_new_vm("TemplateVM", name="fresh", label="black")
    assert {v.revisions_to_keep for v in fresh.volumes.values() if v.save_on_stop} == {
        4
    }


async def test_volumes_are_stopped_in_the_order_in_which_they_are_set(app, template):
    work = await made(app, template, "work")
    before = work.volumes
    work.volumes = {"volatile": before.pop("volatile")}
    work.volumes.update(before)
    assert list(work.storage.volumes) == ["volatile", "root", "private"]
    stopped = []
    for name, volume in work.volumes.items():
        volume.stop = lambda name=name: asyncio.sleep(0, stopped.append(name))
    await work.storage.stop()
    assert stopped == ["volatile", "root", "private"]


async def test_content_goes_from_vm_to_vm(app, template):
    work, other = [await made(app, template, name) for name in ("work", "other")]
    told = []
    other.add_handler("domain-import-volume", lambda *_, **kwargs: told.append(kwargs))
    size = 1 << 20
    path = await work.storage.import_data("private", size)
    path.write_bytes(b"mine".ljust(size, b"\0"))
    await work.storage.import_data_end("private", True)
    source, target = work.volumes["private"], other.volumes["private"]
    assert await other.storage.import_volume(target, source) is target
    assert told == [{"name": "private", "source": source}]
    path = await other.storage.export(target)
    assert path.read_bytes()[:4] == b"mine"
    await other.storage.export_end(target, path)
    path = await other.storage.import_data(target, None)
    assert path.stat().st_size == size
    await other.storage.import_data_end(target, False)


async def test_snapshots_are_not_taken_away_from_who_runs(app, template):
    work = await made(app, template, "work")
    work.template_for_dispvms = True
    disposable = await app.create_vm("DispVM", name="disp1", template=work)
    with pytest.raises(exc.QubesValueError, match="from -1, not -2"):
        work.storage.set_revisions_to_keep("private", -2)
    for running in (work, disposable):
        running.life.state = PowerState.RUNNING
        work.storage.set_revisions_to_keep("private", 3)
        with pytest.raises(exc.QubesVMNotHaltedError, match=f"VM {running}"):
            work.storage.set_revisions_to_keep("private", -1)
        running.life.state = PowerState.HALTED
    assert work.volumes["private"].revisions_to_keep == 3
    work.storage.set_revisions_to_keep("private", -1)
    work.life.state = PowerState.RUNNING
    with pytest.raises(exc.QubesVMNotHaltedError):
        work.storage.set_revisions_to_keep("private", 0)
    work.life.state = PowerState.HALTED


async def test_pools_by_themselves_and_by_name(app, template, tmp_path):
    pool = await app.add_pool("more", driver="file", dir_path=str(tmp_path / "more"))
    assert app.get_pool(pool) is app.get_pool("more") is pool
    assert pool == "more" != app.default_pool
    assert {pool, "more"} == {"more"}
    with pytest.raises(exc.QubesException, match="there is a pool 'more' already"):
        await app.add_pool("more", driver="file", dir_path=str(tmp_path / "again"))
    with pytest.raises(exc.QubesException, match="no storage driver 'none'"):
        await app.add_pool("again", driver="none")
    app.default_pool_private = pool
    work = await made(app, template, "work")
    assert (work.volumes["private"].pool, work.volumes["volatile"].pool) == (
        pool,
        app.default_pool,
    )
    await app.domains.remove(work)
    with pytest.raises(exc.QubesPoolInUseError, match="default_pool_private"):
        await app.remove_pool("more")
    del app.default_pool_private
    await app.remove_pool("more")
