"""Which logs of guests belong to a test."""

from qubes_itests.report.guest_logs import GuestLogs


def log(directory, app, vm, text, name="console.log"):
    path = directory / "apps" / app / "vms" / vm / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(text)
    return path


def test_new_ones_and_those_that_have_grown_are_of_the_test(tmp_path):
    log(tmp_path, "1", "still", "before")
    grown = log(tmp_path, "1", "talks", "before")
    logs = GuestLogs(tmp_path, [tmp_path / "apps" / "1"])
    log(tmp_path, "1", "talks", "more")
    silent = log(tmp_path, "1", "silent", "")
    new = log(tmp_path, "2", "new", "")
    assert logs.written() == [silent, grown, new]


def test_all_logs_of_a_vm_are_its(tmp_path):
    log(tmp_path, "1", "talks", "before", "agent.log")
    log(tmp_path, "1", "talks", "before")
    logs = GuestLogs(tmp_path, [tmp_path / "apps" / "1"])
    console = log(tmp_path, "1", "talks", "more")
    assert logs.written() == [console.with_name("agent.log"), console]


def test_apps_of_earlier_tests_are_not_looked_at(tmp_path):
    """There are as many of them as there were tests."""
    old = log(tmp_path, "1", "work", "before")
    logs = GuestLogs(tmp_path, [])
    log(tmp_path, "1", "work", "after")
    new = log(tmp_path, "2", "work", "")
    assert logs.written() == [new]
    assert logs.all() == [old, new]


def test_where_nothing_is_known_of_apps_all_may_still_write(tmp_path):
    old = log(tmp_path, "1", "work", "before")
    logs = GuestLogs(tmp_path)
    assert logs.written() == []
    log(tmp_path, "1", "work", "after")
    assert logs.written() == [old]


def test_a_run_without_vms_has_none(tmp_path):
    logs = GuestLogs(None)
    assert logs.written() == []
    logs.found(tmp_path)
    new = log(tmp_path, "1", "work", "")
    assert logs.written() == [new]
