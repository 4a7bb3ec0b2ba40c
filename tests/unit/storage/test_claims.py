"""What one process has started, another knows; two pools in one process as well."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from qubes_storage.exc import VolumeStateError
from qubes_storage.locks import Claims
from qubes_storage.reflink import ReflinkPool


@pytest.fixture
def other(shop):
    """Return a second pool over the same directory."""
    pool = ReflinkPool(name="other", dir_path=shop.directory, setup_check="no")
    shop.run(pool.setup())
    yield pool
    shop.run(pool.destroy())


@pytest.fixture
def volume(shop):
    volume = shop.volume()
    shop.run(volume.create())
    shop.session(volume, b"1")
    return volume


def twin(pool, volume):
    """Return the volume as another pool object sees it."""
    return pool.init_volume(None, {**volume.config, "pool": pool.name})


ACTIONS = {
    "start": lambda v: v.start(),
    "stop": lambda v: v.stop(),
    "remove": lambda v: v.remove(),
    "resize": lambda v: v.resize(v.size * 2),
    "revert": lambda v: v.revert(),
    "import": lambda v: v.import_data(),
}


@pytest.mark.parametrize("action", ACTIONS)
def test_what_another_has_started_is_left_alone(shop, volume, other, action):
    shop.run(volume.start())
    shop.write(volume.path, b"2")
    before = shop.tree()
    with pytest.raises(VolumeStateError, match="another process") as caught:
        shop.run(ACTIONS[action](twin(other, volume)))
    assert caught.value.vid == volume.vid
    assert shop.tree() == before
    shop.run(volume.stop())
    assert shop.committed(volume) == b"2"
    assert shop.run(twin(other, volume).start()).is_dirty()


@pytest.mark.parametrize("action", ACTIONS)
def test_what_another_imports_is_left_alone(shop, volume, other, action):
    path = shop.run(volume.import_data())
    with pytest.raises(VolumeStateError, match="another process"):
        shop.run(ACTIONS[action](twin(other, volume)))
    shop.write(path, b"2")
    shop.run(volume.import_data_end(success=True))
    assert shop.committed(volume) == b"2"


def test_the_committed_image_of_what_another_has_started_can_be_read(
    shop, volume, other
):
    shop.run(volume.start())
    shop.write(volume.path, b"2")
    same = twin(other, volume)
    image = shop.run(same.export())
    assert shop.read(image) == b"1"
    shop.run(same.export_end(image))
    shop.run(same.verify())


def test_an_image_that_another_exports_is_never_written(shop, volume, other):
    """Not even where no snapshots are kept."""
    same = twin(other, volume)
    image = shop.run(same.export())
    volume.revisions_to_keep = -1
    shop.run(shop.volume(revisions_to_keep=0).start())
    shop.run(volume.stop())
    volume = shop.volume(revisions_to_keep=-1)
    with image.open("rb") as reader:
        shop.session(volume, b"2")
        assert reader.read(1) == b"1"
    shop.run(same.export_end(image))
    before = volume.files.clean.stat().st_ino
    shop.session(volume, b"3")
    assert volume.files.clean.stat().st_ino == before


def test_what_a_dead_process_had_started_is_free(shop, volume):
    """Its changes are gone on with: the kernel has dropped its claim."""
    reader, writer = os.pipe()
    shop.run(shop.pool.settled())
    pid = os.fork()
    if not pid:
        shop.run(volume.start())
        shop.write(volume.path, b"2")
        os.write(writer, b"started")
        signal.pause()
    try:
        assert os.read(reader, 7) == b"started"
        with pytest.raises(VolumeStateError, match="another process"):
            shop.run(volume.start())
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)
        os.close(writer)
    shop.run(volume.start())
    assert shop.read(volume.path) == b"2"


def test_an_idle_pool_keeps_no_file_open(shop, volume):
    """Or its filesystem could not be unmounted."""

    def opened():
        links = list(Path("/proc/self/fd").iterdir())
        targets = [link.readlink() for link in links if link.is_symlink()]
        return [path for path in targets if path.is_relative_to(shop.directory)]

    shop.run(volume.start())
    assert len(opened()) == 1
    shop.run(volume.stop())
    shop.run(shop.pool.settled())
    assert opened() == []
    shop.run(volume.start())
    shop.run(shop.pool.destroy())
    assert opened() == []
    claims = Claims(shop.directory)
    assert not claims.is_elsewhere("private")
    assert opened() == []


def test_claims_count(tmp_path):
    mine, theirs = Claims(tmp_path), Claims(tmp_path)
    assert mine.take("a")
    assert mine.take("a")
    assert not theirs.take("a")
    assert not theirs.take("a", shared=True)
    assert theirs.take("b")
    mine.drop("a")
    assert theirs.is_elsewhere("a")
    mine.drop("a")
    assert theirs.take("a")
    theirs.close()
    assert mine.take("b", shared=True)
    assert theirs.take("b", shared=True)
    mine.close()
    theirs.close()


@pytest.mark.asyncio
async def test_a_cancelled_operation_is_brought_to_its_end(tmp_path, shop_class):
    """Who comes next finds its work done, not half-done."""
    shop = await asyncio.to_thread(shop_class, tmp_path / "pool")
    volume = shop.volume()
    await volume.create()
    starting = asyncio.ensure_future(volume.start())
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert shop.pool.state(volume.vid).started == volume.is_dirty()
