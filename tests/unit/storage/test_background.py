"""Work that nobody waits for: when it is done, held up, given up."""

from __future__ import annotations

import os
import threading

import pytest

from qubes_storage import ficlone
from qubes_storage.files import GIVEN_UP
from qubes_storage.operation import Background


@pytest.fixture
def background():
    background = Background(idle=60)
    yield background
    background.close()


def test_jobs_run_and_their_thread_ends(background):
    done = []
    for key in "ab":
        background.soon(key, lambda _, key=key: done.append(key))
    background.settle()
    assert sorted(done) == ["a", "b"]
    assert not [t for t in threading.enumerate() if t.name == "qubes_storage"]


def test_a_job_that_fails_keeps_no_other_from_running(background):
    done = []
    background.soon("a", lambda _: os.unlink("/nonexistent/file"))  # noqa: PTH108
    background.soon("b", lambda _: done.append("b"))
    background.settle()
    assert done == ["b"]


def test_a_job_for_idle_times_waits_for_one():
    background = Background(idle=0.01)
    done = threading.Event()
    with background.operation():
        background.when_idle("a", lambda _: done.set())
        assert not done.wait(0.1)
    assert done.wait(300)
    background.settle()


def test_a_job_is_held_up_by_an_operation(background):
    begun, asked, went_on = threading.Event(), threading.Event(), threading.Event()

    def job(go_on):
        begun.set()
        asked.wait(300)
        assert go_on()
        went_on.set()

    background.soon("a", job)
    assert begun.wait(300)
    with background.operation():
        asked.set()
        assert not went_on.wait(0.1)
    assert went_on.wait(300)


def test_closing_interrupts_the_job_and_drops_the_others(background):
    begun, seen = threading.Event(), []

    def job(go_on):
        begun.set()
        while go_on():
            pass
        seen.append("interrupted")

    background.soon("a", job)
    background.when_idle("b", lambda _: seen.append("never"))
    assert begun.wait(300)
    background.close()
    assert seen == ["interrupted"]


@pytest.fixture
def saved(shop):
    volume = shop.volume()
    shop.run(volume.create())
    shop.session(volume, b"1")
    shop.session(volume, b"2")
    shop.run(shop.pool.settled())
    return volume


def test_no_file_is_removed_while_somebody_waits(shop, saved, monkeypatch):
    """A surplus revision, the former image, a volatile one: all are only renamed."""
    monkeypatch.setattr(shop.pool.background, "soon", lambda *_: None)
    removed = []
    monkeypatch.setattr("qubes_storage.files.remove", removed.append)
    shop.session(saved, b"3")
    shop.run(saved.revert())
    saved.revisions_to_keep = 0
    shop.session(saved, b"4")
    volatile = shop.volume("volatile")
    shop.session(volatile, b"x")
    snapshot = shop.volume("snapshot", source=saved)
    shop.session(snapshot, b"x")
    assert removed == []
    assert len([path for path in shop.tree() if GIVEN_UP.search(path)]) >= 5
    monkeypatch.undo()
    shop.session(saved, b"5")
    assert not [p for p in shop.tree() if GIVEN_UP.search(p) and "private" in p]


def test_an_abandoned_clone_leaves_nothing(shop, saved):
    before = shop.tree()
    shop.pool.shares_extents = True  # as on btrfs: a slice at a time
    saved._prepare(lambda: False)
    assert shop.tree() == before


def test_a_clone_of_what_is_not_committed_any_more_is_not_taken(
    shop, saved, monkeypatch
):
    """A commit came in between."""
    real = ficlone.copy_sparse

    def meanwhile(*arguments):
        real(*arguments)
        monkeypatch.undo()
        shop.session(saved, b"3")

    monkeypatch.setattr(ficlone, "copy_sparse", meanwhile)
    shop.run(saved.prepare())
    assert not saved.files.precache.exists()
    shop.run(saved.start())
    assert shop.read(saved.path) == b"3"


def test_a_clone_in_the_making_does_not_keep_a_start_waiting(shop, saved, monkeypatch):
    """The start takes its name away, makes its own clone, and goes on."""
    real = ficlone.copy_sparse

    def meanwhile(*arguments):
        real(*arguments)
        monkeypatch.undo()
        shop.run(saved.start())

    monkeypatch.setattr(ficlone, "copy_sparse", meanwhile)
    shop.run(saved.prepare())
    assert shop.read(saved.path) == b"2"
    assert not saved.files.precache.exists()
    shop.run(saved.stop())


@pytest.mark.parametrize("change", ["time", "size"])
def test_a_prepared_clone_of_something_else_is_not_taken(shop, saved, change):
    """Another program, or a power cut, has left it."""
    shop.run(saved.prepare())
    shop.write(saved.files.precache, b"x")
    if change == "size":
        status = saved.files.clean.stat()
        os.truncate(saved.files.precache, 512)
        os.utime(saved.files.precache, ns=(status.st_atime_ns, status.st_mtime_ns))
    shop.run(saved.start())
    assert shop.read(saved.path) == b"2"
    assert saved.path.stat().st_size == shop.SIZE


def test_a_dirty_image_that_is_too_short_is_no_change_to_keep(shop, saved):
    """A power cut came before the clone was on the disk: nothing was written to it."""
    saved.files.dirty.write_bytes(b"x" * (shop.SIZE - 512))
    assert not saved.is_dirty()
    assert saved.size == shop.SIZE
    shop.run(saved.stop())
    assert shop.committed(saved) == b"2"
    shop.run(saved.start())
    assert shop.read(saved.path) == b"2"
    assert saved.path.stat().st_size == shop.SIZE


def test_idle_pools_prepare_by_themselves(shop, saved, monkeypatch):
    shop.pool.shares_extents = True
    monkeypatch.setattr(
        "qubes_storage.ficlone.clone_in_slices",
        lambda source, target, _: os.sendfile(target, source, 0, shop.SIZE) > 0,
    )
    shop.session(saved, b"3")
    shop.run(shop.pool.settled())
    assert shop.read(saved.files.precache) == b"3"
