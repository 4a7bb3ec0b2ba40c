"""A process that dies before any of its calls leaves the old state or the new one."""

from __future__ import annotations

import os
import sys

import pytest

# What may change the tree; Python reports each of these before it makes the call.
_BY_PATH = {"open", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir"}
_BY_DESCRIPTOR = {"os.truncate", "fcntl.ioctl"}
_CRASHED = 86
_MOST_STEPS = 100


class Crash:
    """One pool for each step at which a process may die.

    :param shop: makes the pools.
    :param action: called with the volume in the process that dies.
    """

    def __init__(self, shop, action):
        self.shop = shop
        self.action = action
        self.root = shop.directory

    def states(self, *, observe):
        """Return what `observe` finds after a death at each step, then at the end."""
        found = []
        for steps in range(_MOST_STEPS):
            self.shop.directory = self.root / str(steps)
            self.shop.reopen()
            volume = self._prepare()
            crashed = self._run(steps, volume)
            self.shop.reopen()
            found.append(observe(self.shop))
            self._must_go_on()
            if not crashed:
                return found
        return pytest.fail("the operation has no end")

    def _prepare(self):
        """Return a volume with the content 2 and the revisions 0 and 1."""
        volume = self.shop.volume(revisions_to_keep=2)
        self.shop.run(volume.create())
        for content in (b"1", b"2"):
            self.shop.session(volume, content)
        self.shop.run(volume.prepare())
        self.shop.run(self.shop.pool.settled())
        return volume

    def _run(self, steps, volume):
        pid = os.fork()
        if not pid:
            self._die(steps, volume)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in {0, _CRASHED}
        return status == _CRASHED

    def _die(self, steps, volume):
        left = steps

        def count(event, arguments):
            nonlocal left
            if event in _BY_DESCRIPTOR or (
                event in _BY_PATH and str(arguments[0]).startswith(str(self.root))
            ):
                if not left:
                    os._exit(_CRASHED)
                left -= 1

        sys.addaudithook(count)
        try:
            self.action(self.shop, volume)
        except BaseException:  # noqa: BLE001 - a child of fork must not return
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)

    def _must_go_on(self):
        """Whatever was left, the volume can be used, and the leftovers go."""
        volume = self.shop.volume(revisions_to_keep=2)
        if not (volume.files.clean.exists() or volume.files.dirty.exists()):
            self.shop.run(volume.create())
        self.shop.session(volume, b"9")
        assert self.shop.committed(volume) == b"9"
        assert len(volume.revisions) <= 2
        assert {path for path in self.shop.tree() if "~" in path} == set()
        self.shop.run(volume.remove())
        assert self.shop.tree() == set()


def state(shop):
    """Return content, size and revisions; a surplus one goes at the next commit."""
    volume = shop.volume(revisions_to_keep=2)
    if not volume.files.clean.exists():
        assert not volume.revisions
        return None
    return shop.committed(volume), volume.size, shop.kept(volume)[-2:]


def unique(states):
    return list(dict.fromkeys(states))


def test_a_crash_during_revert(shop):
    states = Crash(shop, lambda s, v: s.run(v.revert())).states(observe=state)
    assert len(states) > 5
    assert unique(states) == [
        (b"2", shop.SIZE, b"\x001"),
        (b"1", shop.SIZE, b"12"),
    ]


def test_a_crash_during_resize(shop):
    def resize(shop, volume):
        shop.run(volume.resize(shop.SIZE * 2))

    states = Crash(shop, resize).states(observe=state)
    assert unique(states) == [
        (b"2", shop.SIZE, b"\x001"),
        (b"2", shop.SIZE * 2, b"\x001"),
    ]


def test_a_crash_during_import(shop):
    def import_data(shop, volume):
        path = shop.run(volume.import_data(512))
        shop.write(path, b"3")
        shop.run(volume.import_data_end(success=True))

    states = Crash(shop, import_data).states(observe=state)
    assert unique(states) == [
        (b"2", shop.SIZE, b"\x001"),
        (b"3", 512, b"12"),
    ]


def test_a_crash_during_removal(shop):
    states = Crash(shop, lambda s, v: s.run(v.remove())).states(observe=state)
    assert unique(states) == [(b"2", shop.SIZE, b"\x001"), None]


def test_an_interrupted_removal_leaves_nothing_to_the_next_volume(shop):
    """Not even to one that begins with an import: it may be another VM's."""
    volume = shop.volume()
    shop.run(volume.create())
    shop.session(volume, b"1")
    volume.files.clean.unlink()
    assert not volume.revisions
    path = shop.run(volume.import_data(512))
    shop.write(path, b"2")
    shop.run(volume.import_data_end(success=True))
    assert not volume.revisions
    assert shop.tree() == {"appvms/work/private.img"}


def test_a_crash_from_start_to_stop(shop):
    """What a VM has written is there at the next start, or nothing of it is."""

    def session(shop, volume):
        shop.session(volume, b"3")

    def next_start(shop):
        volume = shop.volume(revisions_to_keep=2)
        shop.run(volume.start())
        content = shop.read(volume.path)
        shop.run(volume.stop())
        return content

    states = Crash(shop, session).states(observe=next_start)
    assert unique(states) == [b"2", b"3"]


def test_a_crash_while_a_snapshot_starts(shop):
    """The snapshot starts from its source all the same."""

    def start(shop, volume):
        shop.run(shop.volume("snapshot", source=volume).start())

    def next_start(shop):
        volume = shop.volume(revisions_to_keep=2)
        snapshot = shop.volume("snapshot", source=volume)
        shop.run(snapshot.start())
        content = shop.read(snapshot.path), snapshot.is_outdated()
        shop.run(snapshot.stop())
        shop.run(snapshot.remove())
        return content

    states = Crash(shop, start).states(observe=next_start)
    assert unique(states) == [(b"2", False)]


def test_a_commit_that_is_done_twice_makes_one_revision(shop):
    """A crash between the link and the rename must not show, now or later."""
    volume = shop.volume(revisions_to_keep=5)
    shop.run(volume.create())
    shop.run(volume.start())
    shop.write(volume.path, b"1")
    volume.files._keep_present(volume.revisions_to_keep)
    shop.reopen()
    volume = shop.volume(revisions_to_keep=5)
    assert list(volume.revisions) == []
    shop.session(volume, b"2")
    assert shop.kept(volume) == b"\0"


def test_what_is_not_ours_stays(shop):
    volume = shop.volume()
    shop.run(volume.create())
    theirs = {
        f"appvms/work/{name}"
        for name in (
            "private.img~",
            "private.img~0123456",
            "private.img~0123456g",
            "other.img~01234567",
            "private2.img~01234567",
            "private.img.bak",
            "icon.png",
        )
    }
    for path in theirs:
        (shop.directory / path).write_text("mine")
    shop.session(volume, b"1")
    shop.run(volume.remove())
    assert shop.tree() == theirs


def test_what_an_interrupted_check_of_the_pool_left_goes(shop):
    left = shop.directory / ".reflink-check~01234567"
    theirs = shop.directory / ".reflink-check~x"
    left.touch()
    theirs.touch()
    shop.reopen()
    assert not left.exists()
    assert theirs.exists()
