"""What a failed test leaves of guests that systemd runs."""

import pytest

from qubes_itests.report.artifacts import Artifacts
from qubes_itests.report.guest_files import read_guests
from qubes_itests.run.hooks import registry


@pytest.fixture
def artifacts(tmp_path):
    return Artifacts(tmp_path)


def read(pair, vm):
    """Return what is read of a VM: files, problems."""
    return pair.run(read_guests([vm], ()))


def test_the_journal_of_a_guest_is_kept_if_it_has_one(pair, testbed, artifacts):
    pair.sh(pair.work, "logger here is what went wrong || :")
    artifacts.collect("a-test", testbed, registry().hook)
    path = artifacts.directory("a-test") / "work.journal.txt"
    assert path.is_file() == (pair.init == "systemd")
    if path.is_file():
        assert "here is what went wrong" in path.read_text()


def test_of_a_guest_that_does_not_answer_that_is_said(pair):
    pair.run(pair.vault.pause())
    files, problems = read(pair, pair.vault)
    assert files == {}
    assert ["is not running" in problem for problem in problems] == (
        [True] if pair.init == "systemd" else []
    )
    pair.run(pair.vault.unpause())


@pytest.mark.parametrize(
    ("command", "timeout", "said"),
    [("cat /dev/zero", 1000, "wrote more than"), ("sleep 1000", 0.5, "within 0.5 s")],
)
def test_a_guest_that_says_too_much_or_nothing_is_not_heard(
    pair, monkeypatch, command, timeout, said
):
    monkeypatch.setattr("qubes_itests.report.guest_files._JOURNAL", command)
    monkeypatch.setattr("qubes_itests.report.guest_files._TIMEOUT", timeout)
    files, problems = read(pair, pair.work)
    assert files == {}
    assert [said in problem for problem in problems] == (
        [True] if pair.init == "systemd" else []
    )
