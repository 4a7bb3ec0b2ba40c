"""What a failed test leaves of guests that systemd runs."""

import pytest

from qubes_itests.report.artifacts import Artifacts
from qubes_itests.report.journal import read_journal
from qubes_itests.run.hooks import registry


@pytest.fixture
def artifacts(tmp_path):
    return Artifacts(tmp_path)


def test_the_journal_of_a_guest_is_kept_if_it_has_one(pair, testbed, artifacts):
    pair.sh(pair.work, "logger here is what went wrong || :")
    artifacts.collect("a-test", testbed, registry().hook)
    path = artifacts.directory("a-test") / "work.journal.txt"
    assert path.is_file() == (pair.init == "systemd")
    if path.is_file():
        assert "here is what went wrong" in path.read_text()


def test_a_guest_that_does_not_answer_has_none(pair, testbed):
    pair.run(pair.vault.pause())
    assert read_journal(testbed.portal, pair.vault) is None
    pair.run(pair.vault.unpause())


def test_a_guest_that_says_too_much_is_not_heard(pair, testbed, monkeypatch):
    monkeypatch.setattr("qubes_itests.report.journal._COMMAND", "cat /dev/zero")
    monkeypatch.setattr("qubes_itests.report.journal._TIMEOUT", 1000)
    assert read_journal(testbed.portal, pair.work) is None


def test_a_guest_that_says_nothing_is_not_waited_for(pair, testbed, monkeypatch):
    monkeypatch.setattr("qubes_itests.report.journal._COMMAND", "sleep 1000")
    monkeypatch.setattr("qubes_itests.report.journal._TIMEOUT", 0.5)
    assert read_journal(testbed.portal, pair.work) is None
