"""What there is of this machine's memory, and how workers share it."""

import pytest

from qubes_itests.exc import UsageError
from qubes_itests.host.memory import LEAST, available, for_vms, share

MEMINFO = "MemTotal:       16000000 kB\nMemAvailable:    8388608 kB\nSwapFree: 1 kB\n"


@pytest.fixture
def machine(tmp_path):
    """Return the account of a machine with 8 GiB available."""
    (tmp_path / "meminfo").write_text(MEMINFO)
    return tmp_path


def limit(machine, most, used):
    (machine / "memory.max").write_text(f"{most}\n")
    (machine / "memory.current").write_text(f"{used}\n")
    return available(machine / "meminfo", machine)


def test_without_a_control_group_it_is_what_the_kernel_says(machine):
    assert available(machine / "meminfo", machine / "none") == 8192


def test_a_container_may_have_less(machine):
    assert limit(machine, 3 << 30, 1 << 30) == 2048
    assert limit(machine, 64 << 30, 1 << 30) == 8192
    assert limit(machine, "max", 1 << 30) == 8192
    assert limit(machine, 1 << 30, 2 << 30) == 0


def test_this_machine_has_some_and_keeps_some():
    assert 0 < for_vms() < available()


def test_workers_share_it_evenly():
    assert share(6000, 1) == 6000
    assert share(6000, 3) == 2000
    assert share(LEAST * 4, 4) == LEAST


def test_the_most_workers_are_said_where_there_are_too_many():
    with pytest.raises(UsageError, match="-n 3 is the most"):
        share(LEAST * 4 - 1, 4)
    with pytest.raises(UsageError, match="each needs 3072 MiB") as caught:
        share(6000, 2, 3072)
    assert caught.value.exit_code == 4
