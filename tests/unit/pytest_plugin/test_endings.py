"""What the end of a run tells, whatever cannot be kept of it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from qubes_itests.exit_codes import ExitCode
from qubes_itests.fixtures.session import CONTEXT
from qubes_itests.pytest_plugin import SETTINGS
from qubes_itests.pytest_plugin.history import HistoryKeeper
from qubes_itests.pytest_plugin.job import Job
from qubes_itests.pytest_plugin.recording import Recording
from qubes_itests.pytest_plugin.run_record import RunRecord
from qubes_itests.pytest_plugin.watch import FailureWatch
from qubes_itests.report.artifacts import Artifacts
from qubes_itests.report.failures import Failure
from qubes_itests.report.history import History
from qubes_itests.report.results import Results
from qubes_itests.run.settings import Settings
from qubes_itests.timeline import Recorder, begin, recording

WORDS = [
    *("-q", "-p", "no:cacheprovider", "-p", "no:asyncio", "-c", "/dev/null"),
    *("--rootdir=.", "--import-mode=importlib", "."),
]


def test_a_cache_that_cannot_be_written_hides_no_failure(tmp_path):
    (tmp_path / "directories").touch()
    watch = SimpleNamespace(
        failures={"a::b": Failure("a::b", "1 is not 2")},
        panics={},
        artifacts=Artifacts(tmp_path / "none"),
    )
    said = []
    terminal = SimpleNamespace(write_line=said.append, stats={})
    plugins = {"qubes_itests-failures": watch, "terminalreporter": terminal}
    config = SimpleNamespace(
        option=SimpleNamespace(collectonly=False),
        stash={CONTEXT: SimpleNamespace(close=list), SETTINGS: Settings()},
        pluginmanager=SimpleNamespace(get_plugin=plugins.get),
    )
    session = SimpleNamespace(config=config, exitstatus=1, testscollected=1)
    ending = Job(Settings(), tmp_path).pytest_sessionfinish(session)
    next(ending)
    with pytest.raises(StopIteration):
        next(ending)
    assert "  cause       1 is not 2" in said
    assert "could be kept" in said[-1]


def test_an_interrupted_set_up_tells_what_it_waited_for(tmp_path):
    config = SimpleNamespace(
        invocation_params=SimpleNamespace(dir=tmp_path), inipath=None
    )
    context = SimpleNamespace(settings=Settings(), opened_testbed=None)
    watch = FailureWatch(config, context)
    item = SimpleNamespace(nodeid="a::b")
    with recording(Recorder()):
        test = watch.pytest_runtest_protocol(item)
        next(test)
        begin("start", "work")
        with pytest.raises(KeyboardInterrupt):
            test.throw(KeyboardInterrupt())
    name, cause = watch.interrupted
    assert name == "a::b"
    assert cause.startswith("interrupted after ")
    assert cause.endswith(": starts (work)")


@pytest.mark.parametrize(
    ("test", "status"),
    [
        ("raise KeyboardInterrupt", ExitCode.INTERRUPTED),
        ("pytest.exit('that is all', 3)", ExitCode.INTERNAL_ERROR),
    ],
)
def test_a_test_that_was_interrupted_is_in_run_json(
    tmp_path, monkeypatch, test, status
):
    # its own, as modules are imported once
    name = f"test_some_end_{int(status)}.py"
    text = f"import pytest\ndef test_a(): pass\ndef test_b(): {test}\n"
    (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    results = Results(lambda _result: None)
    assert pytest.main(WORDS, [results]) == status
    kept = tmp_path / "kept"
    kept.mkdir()
    config = SimpleNamespace(stash={}, rootpath=tmp_path)
    watch = SimpleNamespace(artifacts=Artifacts(kept), failures={})
    record = RunRecord(Settings(), watch, results)
    record.pytest_sessionfinish(SimpleNamespace(config=config), status)
    told = json.loads((kept / "run.json").read_text())
    assert told["outcome"] == "interrupted"
    rows = [(row["test"], row["outcome"], row["cause"]) for row in told["tests"]]
    assert rows == [
        (f"{name}::test_a", "passed", ""),
        (f"{name}::test_b", "", "interrupted"),
    ]


def test_a_history_that_breaks_is_told_and_fails_no_run(tmp_path, monkeypatch):
    (tmp_path / "test_some_good.py").write_text("def test_a(): pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUBES_ITESTS_CACHE", str(tmp_path / "cache"))

    def collect(_history):
        raise OSError("no room")

    monkeypatch.setattr(History, "collect", collect)
    said = []
    terminal = SimpleNamespace(write_line=said.append)
    plugins = SimpleNamespace(get_plugin=lambda _name: terminal)
    config = SimpleNamespace(stash={}, rootpath=tmp_path, pluginmanager=plugins)
    keeper = HistoryKeeper(config)
    assert pytest.main(WORDS, [keeper, keeper.results]) == ExitCode.OK
    assert said == ["history: no room"]


def test_a_class_of_an_app_may_have_phases_of_another_kind(tmp_path, monkeypatch):
    (tmp_path / "test_some_phases.py").write_text(
        "class TestBoot:\n    phases = ('early', 'late')\n    def test_a(self): pass\n"
    )
    monkeypatch.chdir(tmp_path)
    recording_ = Recording(Settings(), Artifacts(tmp_path / "kept"))
    assert pytest.main(WORDS, [recording_]) == ExitCode.OK
