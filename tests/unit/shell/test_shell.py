"""A shell on a real terminal, in a guest that is a process here."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from conditions import wait_until
from hypothesis import given
from hypothesis import strategies as st
from terminal_user import TerminalUser

from qubes_itests.shell.session import Keys

PROGRAM = Path(__file__).parents[2] / "support/shell_program.py"
PROMPT = "prompt> "


@pytest.fixture
def start(agent_program, tmp_path):
    """Return a function that starts the program on a terminal, which it returns."""
    started = []

    def start(size=(100, 30), **variables):
        command = [
            sys.executable,
            str(PROGRAM),
            str(agent_program),
            str(tmp_path / "r"),
        ]
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join(sys.path),
            **variables,
        }
        started.append(TerminalUser(command, tmp_path, environment, 40, size))
        return started[-1]

    yield start
    for user in started:
        user.close()


@pytest.fixture
def user(start):
    """Return somebody at the terminal who has got the shell's prompt."""
    user = start()
    user.read_until("$ " if os.getuid() else "# ")
    user.type(f"PS1='{PROMPT[:3]}''{PROMPT[3:]}'\r")
    user.read_until(PROMPT)
    return user


@pytest.fixture
def guest(tmp_path):
    """Return a function that sends the guest's agent a signal."""
    return lambda number: os.kill(int((tmp_path / "r/pid").read_text()), number)


def say(user, command):
    """Run a command in the shell; return what it shows."""
    user.type(f"{command}; echo e''nd\r")
    shown = user.read_until("end\r\n")
    user.read_until(PROMPT)
    return shown.partition("\r\n")[2].removesuffix("end\r\n")


def test_it_is_a_terminal_and_its_status_is_the_shells(user):
    assert say(user, "tty").startswith("/dev/pts/")
    assert say(user, "echo $TERM") == "vt220\r\n"
    assert user.present_modes() != user.modes
    user.type("exit 7\r")
    assert user.finish() == 7
    assert user.present_modes() == user.modes


def test_its_size_is_the_windows_and_goes_with_it(user):
    assert say(user, "stty size") == "30 100\r\n"
    script = "trap 'stty size; exit' WINCH; echo re''ady; while :; do sleep 0.02; done"
    user.type(f'sh -c "{script}"\r')
    user.read_until("ready")
    user.resize(132, 43)
    user.read_until("43 132")


def test_a_window_without_a_size_is_one_of_80_by_24(start):
    user = start(size=(0, 0))
    user.read_until("$ " if os.getuid() else "# ")
    user.type("stty size\r")
    user.read_until("24 80")


def test_keys_reach_what_runs_in_the_guest(user):
    user.type("cat\r")
    user.type("twice\r")
    user.read_until("twice\r\ntwice\r\n")
    user.type("\x03")
    user.read_until(PROMPT)
    assert say(user, "echo $?") == f"{128 + signal.SIGINT}\r\n"


def test_bytes_are_what_the_guest_wrote(user):
    """No frame, no escape and no limit is to be seen of what carries them."""
    say(user, "head -c 700000 /dev/zero | tr '\\0' '\\377'")
    assert user.shown.count(b"\xff") == 700_000


def test_what_a_guest_switched_on_is_off_afterwards(user):
    user.type("printf '\\033[?1049h\\033[?1003h\\033[?25l'; exit\r")
    assert user.finish() == 0
    for mode in (b"\x1b[?1047l", b"\x1b[?1003l", b"\x1b[?25h"):
        assert mode in user.shown.rpartition(b"\x1b[?25l")[2]


def test_a_stuck_guest_is_left(user, guest):
    guest(signal.SIGSTOP)
    user.type("exit\r~.")
    user.read_until("The shell was left.")
    guest(signal.SIGCONT)
    assert user.finish() == 255
    assert user.present_modes() == user.modes


def test_a_stuck_guest_is_left_though_it_takes_no_more_keys(user, guest):
    guest(signal.SIGSTOP)
    user.type("x" * (3 << 20) + "\r~.")
    user.read_until("The shell was left.")
    guest(signal.SIGCONT)
    assert user.finish() == 255
    assert b"\a" in user.shown


def test_what_ran_in_a_shell_that_is_left_ends(user):
    user.type('sh -c \'trap "" HUP; echo p""id $$; exec sleep 1000\'\r')
    user.read_until("pid ")
    pid = int(user.read_until("\r\n"))
    user.type("\r~.")
    assert user.finish() == 255
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), f"end of process {pid}")


def test_a_guest_that_goes_is_told(user, guest):
    guest(signal.SIGKILL)
    user.read_until("VM guest")
    assert user.finish() == 255
    assert user.present_modes() == user.modes


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_it_in_order(user, number):
    user.signal(number)
    assert user.finish() == 2
    assert user.present_modes() == user.modes


def test_a_window_that_is_closed_ends_it(user, tmp_path):
    user.hang_up()
    assert user.finish() == 2
    pid = (tmp_path / "r/pid").read_text()
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "end of the guest")


def test_a_shell_that_does_not_start_says_why(start):
    user = start(USER_OF_GUEST="nobody")
    user.read_until("there is no user root")
    assert user.finish() == 127
    assert user.present_modes() == user.modes


@given(st.lists(st.text("a~.\r\n", max_size=6)))
def test_keys_that_leave_are_found_wherever_they_are_cut(parts):
    whole = "".join(parts).encode()
    at_once = Keys().take(whole)
    keys, passed, left = Keys(), b"", False
    for part in parts:
        if not left:
            more, left = keys.take(part.encode())
            passed += more
    assert (passed, left) == at_once


@pytest.mark.parametrize(
    ("typed", "passed", "left"),
    [
        (b"~.", b"", True),
        (b"ls\r~.more", b"ls\r", True),
        (b"a~.", b"a~.", False),
        (b"~~.", b"~.", False),
        (b"~a\r~", b"~a\r", False),
        (b"~\r~.", b"~\r", True),
        (b"\x1b[24~", b"\x1b[24~", False),
    ],
)
def test_keys_that_leave_are_those_of_ssh(typed, passed, left):
    assert Keys().take(typed) == (passed, left)
