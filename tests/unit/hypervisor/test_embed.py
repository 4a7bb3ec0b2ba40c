"""What libvirt learns about QEMU lasts from run to run."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qubes_itests.host.cache import Cache
from qubes_itests.hypervisor.embed import CapabilityCache, emulator_key

LIVE = Path("cache/qemu/capabilities")


@pytest.fixture
def emulator(tmp_path):
    path = tmp_path / "qemu"
    path.write_text("one")
    return path


@pytest.fixture
def run(tmp_path, emulator):
    """Return a function: a run that starts with the cache, and may learn something."""
    cache = Cache(tmp_path / "lasting")

    def perform(number, learns=None):
        root = tmp_path / f"run{number}"
        capabilities = CapabilityCache(cache, root, emulator)
        capabilities.fetch()
        found = {p.name: p.read_text() for p in (root / LIVE).glob("*")}
        if learns is not None:
            (root / LIVE).mkdir(parents=True, exist_ok=True)
            (root / LIVE / "abc.xml").write_text(learns)
        capabilities.store()
        return found

    return perform


def test_a_later_run_finds_what_an_earlier_learnt(run):
    assert run(1, learns="<first/>") == {}
    assert run(2) == {"abc.xml": "<first/>"}
    assert run(3, learns="<second/>") == {"abc.xml": "<first/>"}
    assert run(4) == {"abc.xml": "<second/>"}


def test_runs_at_once(run):
    """Each stores something else; what is left is one of these, whole."""
    texts = ["<run>" + str(n) * 10_000 + "</run>" for n in range(8)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(run, range(8), texts))
    (found,) = run(9).values()
    assert found in texts


def test_the_key_is_of_the_program(emulator):
    key = emulator_key(emulator)
    assert key == emulator_key(emulator)
    emulator.write_text("another")
    assert key != emulator_key(emulator)
