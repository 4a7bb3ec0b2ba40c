"""What a core is asked to do outside of tests: it may hang, or raise what it likes."""

import threading

import pytest

from qubes_itests.dom0.opening import in_time
from qubes_itests.exc import DeadlineError, HarnessError


def test_one_that_hangs_is_told_with_where_it_is():
    going = threading.Event()

    def hang_in_a_driver():
        going.wait()

    try:
        with pytest.raises(DeadlineError) as caught:
            in_time("be described", hang_in_a_driver, timeout=0.1)
    finally:
        going.set()
    assert "the core, asked to be described, within 0.1 s" in str(caught.value)
    assert "in hang_in_a_driver" in str(caught.value)


def test_one_that_ends_the_process_does_not():
    def leave():
        raise SystemExit("enough")

    with pytest.raises(HarnessError, match=r"cannot be imported:\n(.*\n)*.*enough"):
        in_time("be imported", leave)
    assert in_time("be imported", lambda: 3) == 3
