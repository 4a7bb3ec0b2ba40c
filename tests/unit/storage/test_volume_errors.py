"""Files that are not what they should be, and a system that says no."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import signal
import threading

import pytest

from qubes_storage import ficlone, locks
from qubes_storage.exc import (
    InvalidSizeError,
    StoragePoolException,
    VolumeError,
)
from qubes_storage.operation import typed_errors


def _symlink(path, tmp_path):
    target = tmp_path / "precious"
    target.write_bytes(b"precious")
    path.symlink_to(target)


def _dangling(path, _):
    path.symlink_to("nowhere")


def _fifo(path, _):
    os.mkfifo(path)


def _directory(path, _):
    path.mkdir()


@pytest.fixture(params=[_symlink, _dangling, _fifo, _directory])
def impostor(request, tmp_path):
    return lambda path: request.param(path, tmp_path)


@pytest.mark.parametrize("name", ["clean", "dirty", "precache"])
def test_something_else_in_place_of_an_image_is_refused(shop, impostor, name, tmp_path):
    """It is neither followed, nor opened, nor replaced."""
    volume = shop.volume()
    shop.run(volume.create())
    path = getattr(volume.files, name)
    path.unlink(missing_ok=True)
    impostor(path)
    before = os.lstat(path)
    with pytest.raises(VolumeError, match="not a regular file") as caught:
        shop.run(volume.start())
    assert caught.value.vid == volume.vid
    assert caught.value.action == "start"
    assert os.path.samestat(before, os.lstat(path))
    if (tmp_path / "precious").exists():
        assert (tmp_path / "precious").read_bytes() == b"precious"


def test_something_else_in_place_of_a_source_is_refused(shop, impostor):
    template = shop.template()
    template.files.clean.unlink()
    impostor(template.files.clean)
    with pytest.raises(VolumeError, match="not a regular file"):
        shop.run(shop.volume("snapshot", source=template).start())


def test_the_attributes_report_an_impostor_as_well(shop, impostor):
    volume = shop.volume()
    volume.files.directory.mkdir(parents=True)
    impostor(volume.files.clean)
    with pytest.raises(VolumeError, match="not a regular file"):
        _ = volume.size


def test_a_pool_directory_that_vanished(shop):
    volume = shop.volume()
    shop.run(volume.create())
    (shop.directory).rename(shop.directory.with_name("moved"))
    for action in (volume.start, volume.create, volume.remove, volume.verify):
        with pytest.raises(VolumeError, match="directory is absent"):
            shop.run(action())
    assert shop.pool.size is None
    assert not shop.directory.exists()


def test_a_pool_where_a_file_is(tmp_path, shop):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoragePoolException, match="cannot set it up"):
        shop.reopen(dir_path=tmp_path / "file")
    with pytest.raises(StoragePoolException, match="cannot set it up"):
        shop.reopen(dir_path=tmp_path / "file" / "pool")


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, VolumeError),
        (errno.EDQUOT, VolumeError),
        (errno.EFBIG, InvalidSizeError),
        (errno.EIO, VolumeError),
        (errno.EROFS, VolumeError),
    ],
)
def test_errors_of_the_system_become_ours(shop, number, kind):
    volume = shop.volume()
    with pytest.raises(kind) as caught, typed_errors(volume, "start"):
        raise OSError(number, os.strerror(number), "/pool/image")
    error = caught.value
    assert type(error) is kind
    assert isinstance(error, StoragePoolException)
    assert (error.pool, error.vid, error.action) == ("plain", volume.vid, "start")
    assert os.strerror(number) in str(error)
    assert error.__cause__.errno == number


def test_a_limit_of_the_system_leaves_the_old_state(shop):
    """A copy that stops half-way leaves neither a part of it nor a started volume."""
    template = shop.template(b"T")
    volume = shop.volume("snapshot", source=template)
    before = shop.tree()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(InvalidSizeError):
            shop.run(volume.start())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert shop.tree() == before
    shop.run(volume.start())


def test_a_volume_that_another_process_works_on_is_busy(shop):
    volume = shop.volume()
    shop.pool.operations.lock_timeout = 0.05
    with (
        locks.hold(shop.directory, volume.vid),
        pytest.raises(VolumeError, match="works on it"),
    ):
        shop.run(volume.create())
    shop.run(volume.create())


@pytest.mark.asyncio
async def test_operations_that_wait_delay_no_other(tmp_path, shop_class):
    """However many wait for another process, there is a thread for the next."""
    shop = await asyncio.to_thread(shop_class, tmp_path / "pool")
    waiting = [shop.volume(vm=f"work{number}") for number in range(50)]
    with contextlib.ExitStack() as held:
        for volume in waiting:
            held.enter_context(locks.hold(shop.directory, volume.vid))
        tasks = [asyncio.ensure_future(volume.create()) for volume in waiting]
        await asyncio.wait_for(shop.volume().create(), 300)
        assert not [task for task in tasks if task.done()]
    await asyncio.gather(*tasks)


@pytest.mark.asyncio
async def test_the_clone_of_a_snapshot_delays_no_commit_of_its_source(
    tmp_path, shop_class, monkeypatch
):
    """The source is locked until its image has a second name, and no longer."""
    shop = await asyncio.to_thread(shop_class, tmp_path / "pool")
    template = await asyncio.to_thread(shop.template, b"1")
    snapshot = shop.volume("snapshot", source=template)
    await template.start()
    shop.write(template.path, b"2")
    copying, go_on = threading.Event(), threading.Event()
    real = snapshot.copy

    def slowly(*arguments):
        copying.set()
        assert go_on.wait(300)
        return real(*arguments)

    monkeypatch.setattr(snapshot, "copy", slowly)
    starting = asyncio.ensure_future(snapshot.start())
    assert await asyncio.to_thread(copying.wait, 300)
    await asyncio.wait_for(template.stop(), 300)
    go_on.set()
    await starting
    assert shop.read(snapshot.path) == b"1"
    assert snapshot.is_outdated()


def test_a_lock_goes_with_the_process_that_held_it(shop):
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        with locks.hold(shop.directory, "a/b/c"):
            os.write(writer, b"held")
            signal.pause()
    try:
        assert os.read(reader, 4) == b"held"
        with (
            pytest.raises(TimeoutError),
            locks.hold(shop.directory, "a/b/c", shared=True, timeout=0.05),
        ):
            pass
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)
        os.close(writer)
    with locks.hold(shop.directory, "a/b/c", timeout=0):
        pass


def test_readers_share_a_lock_and_writers_do_not(shop):
    with (
        locks.hold(shop.directory, "a/b/c", shared=True),
        locks.hold(shop.directory, "a/b/d"),
    ):
        with locks.hold(shop.directory, "a/b/c", shared=True, timeout=0):
            pass
        for shared in (True, False):
            with (
                pytest.raises(TimeoutError),
                locks.hold(shop.directory, "a/b/d", shared=shared, timeout=0),
            ):
                pass


def test_a_sparse_copy_has_the_same_content_and_holes(tmp_path):
    source = tmp_path / "source"
    with source.open("wb") as file:
        for position in (0, 1 << 20, (8 << 20) + 17):
            file.seek(position)
            file.write(os.urandom(70_000))
        file.truncate(32 << 20)
    target = tmp_path / "target"
    with source.open("rb") as one, target.open("w+b") as other:
        ficlone.copy_sparse(one.fileno(), other.fileno())
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_blocks * 512 < 1 << 20


def test_files_are_for_their_owner_only(shop):
    volume = shop.volume()
    shop.run(volume.create())
    shop.session(volume, b"1")
    shop.run(volume.start())
    for path in shop.directory.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path
