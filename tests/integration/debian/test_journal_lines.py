"""Lines of the journal of a guest in the timeline of a test."""

import pytest

from qubes_itests import timeline
from qubes_itests.guest.exc import GuestGoneError
from qubes_itests.pytest_plugin.guest_complaints import _SAYS
from qubes_itests.report.guest_files import read_guests
from qubes_itests.run.settings import Complaint


@pytest.fixture(scope="module", params=["agent", "systemd"])
def init(request):
    timeline.current().follow_logs = True  # before the first VM starts
    return request.param


@pytest.fixture(autouse=True)
def follow_logs():
    timeline.current().follow_logs = True


def test_what_a_guest_logs_is_recorded_when_it_came_bounded_and_safe_to_show(pair):
    recorder = timeline.current()
    pair.sh(pair.work, "sleep 0.3")
    before = recorder.time()
    tool = "systemd-cat --priority=err --identifier='od d'"
    level, command = "", tool
    if pair.init != "systemd":
        level, command = "<3>", "cat >/dev/kmsg"
    hostile = rf"""printf '{level}\033[31m \377 {{"a": 1}}\n' | {command}"""
    pair.sh(pair.work, hostile, user="root")
    pair.run(pair.work.life.journal.settle(600))
    records = [r for r in recorder.records("journal") if r["vm"] == "work"]
    assert len(records) > 20
    if pair.init == "systemd":  # which says when it did what, in the start of the VM
        (start,) = [r for r in recorder.records("start") if r["vm"] == "work"]
        early = [r for r in records if r["t"] < start["t"] + start["duration"]]
        assert any("Reached target" in r["line"] for r in early)
        assert all(r["t"] >= start["t"] for r in records)
    (said,) = [r for r in records if '\\x1b[31m \\xff {"a": 1}' in r["line"]]
    assert said["priority"] == 3
    assert before - 1 < said["t"] < recorder.time()
    times = [r["t"] for r in recorder.records()]
    assert times == sorted(times)
    commands = [r["command"] for r in recorder.records("run")]
    assert hostile in commands
    assert not any("journalctl" in c or "kmsg" in c for c in {*commands} - {hostile})
    if pair.init == "systemd":  # the kernel itself bounds what it takes
        pair.sh(pair.work, "yes hello | head -n 3000 | systemd-cat", user="root")
        pair.run(pair.work.life.journal.settle(600))
        assert 1000 < len(recorder.records("journal")) <= 2000


def test_a_program_that_crashes_is_seen(pair):
    pair.sh(pair.work, """perl -e 'unpack "p", pack "J", 1' || true""")
    pair.run(pair.work.life.journal.settle(600))
    records = timeline.current().records("journal")
    assert any(_SAYS[Complaint.COREDUMP](record) for record in records)


def test_the_log_ends_with_the_guest_and_begins_with_the_next_start(pair):
    recorder = timeline.current()
    pair.run(pair.vault.kill())
    first = pair.vault.life.journal
    pair.run(pair.vault.start())
    assert pair.vault.life.journal is not first
    pair.run(pair.vault.life.journal.settle(600))
    said = [r for r in recorder.records("journal") if r["vm"] == "vault"]
    assert said[0]["t"] > 0
    with pytest.raises(GuestGoneError):
        pair.run(first.settle(600))


def test_a_journal_that_is_not_followed_is_read_when_a_test_fails(pair):
    recorder = timeline.current()
    recorder.follow_logs = False
    pair.run(pair.vault.kill())
    pair.run(pair.vault.start())
    pair.sh(pair.vault, "logger -p err what went wrong || :")
    assert recorder.records("journal") == []
    pair.run(read_guests([pair.vault], ()))
    (start,) = recorder.records("start")
    found = recorder.records("journal")
    assert bool(found) == (pair.init == "systemd")
    if found:
        (said,) = [r for r in found if "what went wrong" in r["line"]]
        assert said["priority"] == 3
        assert all(r["t"] >= start["t"] for r in found)
        assert said["t"] > start["t"] + start["duration"] / 2
