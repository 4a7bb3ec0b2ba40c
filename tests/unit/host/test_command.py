"""Programs of the host: output, errors, deadlines."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conditions import deadlines

from qubes_itests.exc import DeadlineError
from qubes_itests.guest.image.rootfs import find_tool
from qubes_itests.host import command
from qubes_itests.host.command import CommandError, run, started
from qubes_itests.host.exc import MissingToolError
from qubes_itests.host.packages import find_program


def test_output_and_input():
    assert run(["cat"], input=b"line\n") == "line\n"
    assert run(["cat"]) == ""


def test_no_shell_sees_the_arguments():
    assert run(["printf", "%s", "$(id) `id` ; id"]) == "$(id) `id` ; id"


def test_output_that_is_no_utf8_survives():
    assert os.fsencode(run(["printf", r"\377"])) == b"\xff"


def test_messages_are_english_whatever_the_locale(monkeypatch):
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("LANGUAGE", "de")
    assert run(["sh", "-c", "echo $LC_ALL$LANGUAGE"]) == "C.UTF-8\n"


SHAPING = {
    "CFLAGS": "-O0",
    "CPATH": "/none",
    "MAKEFLAGS": "-n",
    "CC": "false",
    "TAR_OPTIONS": "--exclude=*",
    "XZ_DEFAULTS": "-9",
    "MKE2FS_CONFIG": "/none",
    "GIT_DIR": "/none",
    "PYTHONPATH": "/none",
    "PIP_USER": "1",
    "TZ": "Etc/GMT-9",
    "XDG_CONFIG_HOME": "/none",
    "LC_ALL": "tr_TR.UTF-8",
    "POSIXLY_CORRECT": "1",
}


def test_what_programs_make_does_not_depend_on_the_callers_environment(
    monkeypatch, tmp_path
):
    for name, value in SHAPING.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    before = os.umask(0o077)
    try:
        seen = run(["sh", "-c", f"env -0; umask >{tmp_path}/umask"]).split("\0")
    finally:
        os.umask(before)
    found = dict(line.split("=", 1) for line in seen if line)
    assert found["LC_ALL"] == "C.UTF-8"
    assert found["https_proxy"] == "http://proxy:3128"
    assert not (SHAPING.keys() - {"LC_ALL"}) & found.keys()
    assert (tmp_path / "umask").read_text() == "0022\n"


@pytest.mark.parametrize("path", ["/usr/bin:/bin", "", None])
def test_programs_of_the_system_are_found_where_the_checks_find_them(monkeypatch, path):
    """A user's PATH has no sbin on Debian."""
    if path is None:
        monkeypatch.delenv("PATH")
    else:
        monkeypatch.setenv("PATH", path)
    assert find_program("mkfs.btrfs").parent.name == "sbin"
    assert "mkfs.btrfs" in run(["mkfs.btrfs", "--version"])
    assert find_tool("mke2fs") == find_program("mke2fs")


def test_a_failure_tells_command_status_and_last_words():
    with pytest.raises(CommandError) as caught:
        run(["sh", "-c", "echo first >&2; echo 'last word' >&2; exit 7"])
    assert caught.value.returncode == 7
    assert caught.value.stderr == "first\nlast word"
    assert caught.value.argv[:2] == ("sh", "-c")
    assert "exit status 7" in str(caught.value)
    assert "last word" in str(caught.value)


def test_a_signal_is_named():
    with pytest.raises(CommandError, match=r"signal 15: \(silent\)") as caught:
        run(["sh", "-c", "kill -TERM $$"])
    assert caught.value.returncode == -15


def test_only_the_end_of_a_flood_of_errors_is_kept():
    with pytest.raises(CommandError) as caught:
        run(["sh", "-c", "yes x | head -c 300000 >&2; echo end >&2; exit 1"])
    assert len(caught.value.stderr) <= 2000
    assert caught.value.stderr.endswith("end")


def test_a_missing_program_is_an_environment_that_is_not_ready():
    with pytest.raises(MissingToolError, match="no-such-program is not installed"):
        run(["no-such-program"])


def test_the_deadline_ends_the_children_too(tmp_path):
    """A grandchild that keeps the pipes open neither delays nor survives."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    script = f"echo started >&2; (exec 3<>{fifo}; sleep 600) & sleep 600"
    for seconds in deadlines(0.5):
        late = re.escape(f"no exit of sh within {seconds:g} s")
        with pytest.raises(DeadlineError, match=late) as caught:
            run(["sh", "-c", script], timeout=seconds)
        if caught.value.evidence:
            break
    assert caught.value.evidence == "started"
    # Nobody has the pipe open any more once the grandchild is gone.
    _wait_until_nobody_reads(fifo)


def test_the_deadline_ends_the_children_of_a_program_that_has_ended(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    script = f"(exec 3<>{fifo}; sleep 600) & echo started >&2"
    for seconds in deadlines(0.5):
        with pytest.raises(DeadlineError) as caught:
            run(["sh", "-c", script], timeout=seconds)
        if caught.value.evidence:
            break
    assert caught.value.evidence == "started"
    _wait_until_nobody_reads(fifo)


def test_a_program_that_does_not_end_when_asked_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_ENDING_TIMEOUT", 0.2)
    fifo, null = tmp_path / "fifo", subprocess.DEVNULL
    os.mkfifo(fifo)
    script = f"trap '' TERM; exec 3<>{fifo}; echo ready; while :; do sleep 600; done"
    pipe, term = subprocess.PIPE, signal.SIGTERM
    with started(
        ["sh", "-c", script], stdin=null, stdout=pipe, stderr=null, ending=term
    ) as process:
        assert process.stdout.readline() == b"ready\n"
    assert process.returncode == -signal.SIGKILL
    _wait_until_nobody_reads(fifo)


def _wait_until_nobody_reads(fifo: Path) -> None:
    code = """
import os, sys
while True:
    try:
        os.close(os.open(sys.argv[1], os.O_WRONLY | os.O_NONBLOCK))
    except OSError:
        break
"""
    subprocess.run([sys.executable, "-c", code, fifo], timeout=300, check=True)
