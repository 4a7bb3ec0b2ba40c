"""Tables of device mapper that dom0 takes, and devices that are made at once."""

import contextlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qubes_itests.dom0 import mapper as module
from qubes_itests.dom0.mapper import Mapper
from qubes_itests.dom0.stores import QubesDB


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("a", "0 8 crypt 7:0 0"),
        ("a", "0 8 linear 7:0"),
        ("a", "8 8 linear 7:0 0"),
        ("a", "0 8 linear ../../7:0 0"),
        ("a", "0 8 linear 7:0 0\n8 8 linear 7:1 0"),
        ("../a", "0 8 linear 7:0 0"),
        ("", "0 8 linear 7:0 0"),
    ],
)
def test_others_are_told_what_is_expected(name, table):
    mapper = Mapper(QubesDB())
    with pytest.raises(ValueError, match="expected a name, and a table"):
        mapper.create(name, table)
    with pytest.raises(ValueError, match=r"there is no device 'a'"):
        mapper.remove("a")


def test_devices_that_are_made_at_once_have_numbers_of_their_own(tmp_path, monkeypatch):
    """Each `dmsetup` is served in a thread."""
    both = threading.Barrier(2)

    class Loop:
        path = tmp_path

        def __init__(self, *_arguments, **_options):
            pass

        def __enter__(self):
            # where they are not at once in here, one gives up, and the other follows
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(0.2)
            return self

        def __exit__(self, *_exc):
            pass

    monkeypatch.setattr(module, "LoopDevice", Loop)
    monkeypatch.setattr(module, "MAPPER", tmp_path)
    # needs root
    monkeypatch.setattr(os, "mknod", lambda path, _mode, _device: path.touch())
    source = min(Path("/sys/dev/block").iterdir()).name
    mapper, names = Mapper(QubesDB()), ("a", "b")
    with ThreadPoolExecutor(2) as pool:
        made = [pool.submit(mapper.create, n, f"0 8 linear {source} 0") for n in names]
        for each in made:
            each.result(300)
    found = {mapper.find(Path(f"/dev/dm-{number}")) for number in (0, 1)}
    assert found == {tmp_path / name for name in names}
    mapper.close()
    assert list(tmp_path.iterdir()) == []
