"""Tests have the entry points of one group stand for those of another."""

import importlib.metadata

import pytest

from qubes_itests.testcase import substitute_entry_points
from qubes_storage import drivers


def names(group):
    return importlib.metadata.entry_points(group=group).names


def test_for_a_block_and_within_another():
    before = drivers.driver_names()
    assert "file" in before
    with substitute_entry_points("qubes.storage", "pytest11"):
        assert set(drivers.driver_names()) == names("pytest11")
        with substitute_entry_points("nothing", "qubes.storage"):
            assert names("nothing") == names("pytest11")
        assert not names("nothing")
    assert drivers.driver_names() == before


def test_a_failure_undoes_it_too():
    real = importlib.metadata.entry_points
    with pytest.raises(ArithmeticError), substitute_entry_points("a", "b"):
        raise ArithmeticError
    assert importlib.metadata.entry_points is real
