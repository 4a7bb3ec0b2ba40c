"""Failing one call of a process: the right one, once, and only in the right place."""

from __future__ import annotations

import errno
import os
import threading

import pytest

from qubes_itests.faultdisk import failing_call


def work(directory):
    """Make four calls that change something: open, write, fsync, rename."""
    fd = os.open(directory / "new", os.O_CREAT | os.O_WRONLY, 0o600)
    try:
        os.write(fd, b"text")
        os.fsync(fd)
    finally:
        os.close(fd)
    (directory / "new").rename(directory / "done")


@pytest.mark.parametrize(
    ("nth", "hit"), [(1, "open("), (2, "write("), (3, "fsync("), (4, "rename(")]
)
def test_each_call_in_turn(tmp_path, nth, hit):
    with failing_call(tmp_path, nth) as fault:
        with pytest.raises(OSError, match="No space") as caught:
            work(tmp_path)
        work(tmp_path)  # once only
    assert fault.hit.startswith(hit)
    assert caught.value.errno == errno.ENOSPC
    assert (tmp_path / "done").read_text() == "text"


def test_none_is_left_to_fail(tmp_path):
    with failing_call(tmp_path, 5) as fault:
        work(tmp_path)
    assert fault.hit is None


def test_other_places_are_let_through(tmp_path):
    here, elsewhere = tmp_path / "here", tmp_path / "here-not"
    here.mkdir()
    elsewhere.mkdir()
    with failing_call(here, 1) as fault:
        work(elsewhere)
    assert fault.hit is None


def test_reading_is_let_through(tmp_path):
    work(tmp_path)
    with failing_call(tmp_path, 1) as fault:
        fd = os.open(tmp_path / "done", os.O_RDONLY)
        os.read(fd, 4)
        os.close(fd)
    assert fault.hit is None


def test_calls_of_other_threads_count(tmp_path):
    errors = []

    def run():
        try:
            work(tmp_path)
        except OSError as error:
            errors.append(error.errno)

    with failing_call(tmp_path, 3, errno.EDQUOT) as fault:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert errors == [errno.EDQUOT]
    assert fault.hit.startswith("fsync(")


def test_all_is_as_before_afterwards(tmp_path):
    before = os.fsync, os.rename, os.open
    with failing_call(tmp_path, 1):
        assert os.fsync is not before[0]
    assert (os.fsync, os.rename, os.open) == before
