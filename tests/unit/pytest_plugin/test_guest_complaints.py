"""Which lines of guests are complaints."""

import pytest

from qubes_itests.pytest_plugin.guest_complaints import _SAYS
from qubes_itests.run.settings import Complaint, ConfigurationError, load


def says(kind, line, priority=6):
    return _SAYS[kind]({"line": line, "priority": priority})


@pytest.mark.parametrize(
    "line",
    [
        "kernel: perl[140]: segfault at 1 ip 00007f sp 00007f error 4 in libc.so[7f+1]",
        "kernel: traps: a b[12] trap divide error ip:1 sp:2 error:0 in app[5+1]",
        "kernel: traps: app[12] general protection fault ip:1 sp:2 error:0 in app[5+1]",
        "kernel: traps: app[12] trap invalid opcode ip:1 sp:2 error:0 in app[5+1]",
        "kernel: Core dump to |/usr/lib/systemd/systemd-coredump pipe failed",
        "systemd-coredump[151]: [\U0001f855] Process 148 (sh) of user 0 dumped core.",
        "systemd-coredump[9]: Process 8 (app) of user 1 terminated abnormally with …",
        "systemd[1]: app.service: Main process exited, code=dumped, status=11/SEGV",
        "systemd[1]: app.service: Main process exited, code=killed, status=6/ABRT",
    ],
)
def test_a_core_is_dumped(line):
    assert says(Complaint.COREDUMP, line)


@pytest.mark.parametrize(
    "line",
    [
        "app[7]: segfault at noon",
        "kernel: EXT4-fs (sda): mounted filesystem with ordered data mode",
        "systemd[1]: app.service: Main process exited, code=killed, status=15/TERM",
        "systemd[1]: app.service: Main process exited, code=exited, status=1/FAILURE",
        "systemd-coredump[1]: Coredump processing is set up",
    ],
)
def test_no_core_is_dumped(line):
    assert not says(Complaint.COREDUMP, line, 3)


def test_an_error_has_a_priority_that_says_so():
    found = [n for n in range(8) if says(Complaint.JOURNAL, "x", n)]
    assert found == [0, 1, 2, 3]
    assert not says(Complaint.JOURNAL, "x", None)


def test_settings_say_what_fails_and_what_does_not(tmp_path):
    (tmp_path / "pyproject.toml").write_text(
        "[tool.qubes_itests]\nfail-on = ['coredump']\nallow-line = ['a b', 'c']\n"
    )
    settings = load(tmp_path, {})
    assert settings.fail_on == (Complaint.COREDUMP,)
    assert settings.allow_line == ("a b", "c")


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("fail_on = segfault", "expected one of coredump, journal, got 'segfault'"),
        ("allow_line = (", r"expected a regular expression, got '\('"),
    ],
)
def test_what_of_that_makes_no_sense_is_told(tmp_path, line, error):
    (tmp_path / "setup.cfg").write_text(f"[qubes_itests]\n{line}\n")
    with pytest.raises(ConfigurationError, match=error):
        load(tmp_path, {})
