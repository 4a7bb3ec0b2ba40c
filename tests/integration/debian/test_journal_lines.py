"""Lines of the journal of a guest in the timeline of a test."""

import pytest

from qubes_itests import timeline
from qubes_itests.guest.exc import GuestGoneError
from qubes_itests.pytest_plugin.guest_complaints import _SAYS
from qubes_itests.run.settings import Complaint


def want_whole_logs():
    """Have all of a boot, and the logs of guests without a journal, too."""
    timeline.current().whole_logs = True


#: Before a VM starts, for the first test and for those after it.
for_all = pytest.fixture(scope="module", autouse=True)(want_whole_logs)
for_each = pytest.fixture(autouse=True)(want_whole_logs)


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
    pair.run(pair.work.life.journal.settle(60))
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
        pair.run(pair.work.life.journal.settle(60))
        assert 1000 < len(recorder.records("journal")) <= 2000


def test_a_program_that_crashes_is_seen(pair):
    pair.sh(pair.work, """perl -e 'unpack "p", pack "J", 1' || true""")
    pair.run(pair.work.life.journal.settle(60))
    records = timeline.current().records("journal")
    assert any(_SAYS[Complaint.COREDUMP](record) for record in records)


def test_the_log_ends_with_the_guest_and_begins_with_the_next_start(pair):
    recorder = timeline.current()
    pair.run(pair.vault.kill())
    first = pair.vault.life.journal
    # as in most runs
    recorder.whole_logs = pair.init != "systemd"
    pair.run(pair.vault.start())
    assert pair.vault.life.journal is not first
    pair.run(pair.vault.life.journal.settle(60))
    said = [r for r in recorder.records("journal") if r["vm"] == "vault"]
    assert said[0]["t"] > 0
    if pair.init == "systemd":
        assert 50 <= len(said) < 150
    with pytest.raises(GuestGoneError):
        pair.run(first.settle(60))
