"""A run of pytest that a test makes in its own process."""

import gc

import pytest

from qubes_itests import pytest_plugin


class Collection:
    pytest_collection = staticmethod(pytest_plugin.pytest_collection)


def test_what_a_test_has_is_collected_after_a_run_in_it_too(tmp_path):
    gc.freeze()
    before = gc.get_freeze_count()
    words = ["-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)]
    assert pytest.main(words, [Collection()]) == pytest.ExitCode.NO_TESTS_COLLECTED
    assert gc.get_freeze_count() <= before
