"""Entries of the cache after a power cut at any moment: whole, or not there."""

import contextlib
from functools import partial

import pytest

from qubes_itests.faultdisk import CrashStateError
from qubes_itests.host import cache as cache_module
from qubes_itests.host.cache import Cache

ENTRIES = 8
STATES = 40


def content(number):
    # of several blocks, and of other lengths
    return b"%d\n" % number * (3000 + 900 * (number % 3))


def fill(number, place):
    (place / "below").mkdir()
    for path in (place / "file", place / "below" / "file"):
        path.write_bytes(content(number))


@contextlib.contextmanager
def cache_below(directory):
    """Give a cache whose entries this process does not keep: its disk goes away."""
    try:
        yield Cache(directory / "cache")
    finally:
        for place in [p for p in cache_module._used if directory in p.parents]:
            cache_module._let_go(place)


def workload(fs):
    with cache_below(fs.mount_point) as cache, fs.neighbour():
        for number in range(ENTRIES):
            cache.entry("kind", str(number), partial(fill, number))
            fs.disk.note(str(number))


def check(crash):
    with cache_below(crash.directory) as cache:
        for number in range(ENTRIES):
            place = cache.lookup("kind", str(number))
            if place is None:
                assert str(number) not in crash.reached
                place = cache.entry("kind", str(number), partial(fill, number))
            assert (place / "file").read_bytes() == content(number)
            assert (place / "below" / "file").read_bytes() == content(number)


@pytest.mark.parametrize("kind", ["btrfs", "xfs", "ext4"])
def test_power_cuts_leave_whole_entries(kind, faultdisk, power_cuts):
    recording = faultdisk.record(kind, workload)
    assert faultdisk.examine(recording, check, states=STATES) == power_cuts(STATES)


@pytest.mark.parametrize("forgotten", ["files", "names"])
def test_check_would_see_what_is_not_brought_to_the_disk(
    faultdisk, monkeypatch, forgotten
):
    flush = cache_module._flush

    def forgetful(path):
        if path.is_dir() != (forgotten == "names"):
            flush(path)

    monkeypatch.setattr(cache_module, "_flush", forgetful)
    recording = faultdisk.record("xfs", workload)
    monkeypatch.undo()
    with pytest.raises(CrashStateError):
        faultdisk.examine(recording, check, states=STATES)
