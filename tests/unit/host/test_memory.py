"""What there is of this machine's memory, and how workers share it."""

import pytest

from qubes_itests.exc import UsageError
from qubes_itests.host.memory import LEAST, available, for_vms, kills, share

MEMINFO = "MemTotal:       16000000 kB\nMemAvailable:    8388608 kB\nSwapFree: 1 kB\n"


@pytest.fixture
def machine(tmp_path):
    """Return the account of a machine with 8 GiB available."""
    (tmp_path / "meminfo").write_text(MEMINFO)
    return tmp_path


def limit(machine, most, used, *, own="0::/", place="", files=0):
    """Return what is available in a control group with a limit, MiB."""
    second = place.startswith("memory")
    names = ("limit_in_bytes", "usage_in_bytes") if second else ("max", "current")
    directory = machine / place
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"memory.{names[0]}").write_text(f"{most}\n")
    (directory / f"memory.{names[1]}").write_text(f"{used}\n")
    total = "total_" if second else ""
    (directory / "memory.stat").write_text(
        f"anon 5\n{total}inactive_file {files}\n{total}active_file {files}\n"
    )
    (machine / "own").write_text(f"9:cpu:/elsewhere\n{own}\n")
    return available(machine / "meminfo", machine, machine / "own")


def test_without_a_control_group_it_is_what_the_kernel_says(machine):
    (machine / "own").write_text("")
    assert available(machine / "meminfo", machine, machine / "own") == 8192
    (machine / "own").write_text("0::/gone/from/here\n4:memory:/\n")
    assert available(machine / "meminfo", machine, machine / "own") == 8192
    # a kernel without them
    assert available(machine / "meminfo", machine, machine / "none") == 8192


def test_a_container_may_have_less(machine):
    assert limit(machine, 3 << 30, 1 << 30) == 2048
    assert limit(machine, 64 << 30, 1 << 30) == 8192
    assert limit(machine, "max", 1 << 30) == 8192
    assert limit(machine, 1 << 30, 2 << 30) == 0


@pytest.mark.parametrize(
    ("own", "place"),
    [
        ("0::/user.slice/run.scope", "user.slice/run.scope"),
        ("0::/user.slice/run.scope", "user.slice"),
        ("0::/docker/of-the-host", ""),
        ("4:memory:/docker/1234", "memory/docker/1234"),
        ("4:memory:/docker/1234", "memory/docker"),
        ("4:memory:/docker/of-the-host", "memory"),
    ],
)
def test_the_limit_of_its_own_group_or_of_one_above_counts(machine, own, place):
    assert limit(machine, 3 << 30, 1 << 30, own=own, place=place) == 2048


@pytest.mark.parametrize("place", ["", "memory"])
def test_what_files_fill_is_available(machine, place):
    """A container that has built a template has filled its memory with that."""
    own = f"4:{place}:/" if place else "0::/"
    most, files = 3 << 30, 1 << 30
    assert limit(machine, most, most, own=own, place=place, files=files) == 2048


def test_this_machine_has_some_and_keeps_some():
    assert 0 < for_vms() < available()


def test_what_the_kernel_has_killed_is_counted(tmp_path):
    account = tmp_path / "vmstat"
    account.write_text("drop_slab 0\noom_kill 25\nnuma_hit 3\n")
    assert kills(account) == 25
    account.write_text("drop_slab 0\n")
    assert kills(account) == 0
    assert kills() >= 0


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
