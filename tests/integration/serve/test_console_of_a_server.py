"""``qvm-console``: a root shell in a VM of a server, on a real terminal."""

import re
import signal

import pytest
from conditions import wait_until
from terminal_user import TerminalUser


@pytest.fixture
def start(server, tmp_path):
    """Return a function that starts the program that the server offers."""
    started = []

    def start(vm):
        command = [str(server.socket.with_name("bin") / "qvm-console"), vm]
        started.append(TerminalUser(command, tmp_path, server.environment))
        return started[-1]

    yield start
    for user in started:
        user.close()


def sleeps(server):
    """Tell whether the VM has a process that sleeps."""
    done = server.run("-d", "work", "root:ps -o comm")
    return re.search(rb"^sleep", done.stdout, re.MULTILINE)


def test_it_is_a_shell_with_the_windows_size(start):
    user = start("work")
    user.read_until("A root shell in work.")
    user.read_until("# ")
    user.type("trap 'stty size' WINCH; hostname; stty size; echo re''ady\r")
    assert "work\r\n30 100\r\n" in user.read_until("ready")
    user.read_until("# ")
    user.type("head -c 400000 /dev/zero | tr '\\0' z; echo do''ne; read line\r")
    user.read_until("z" * 400_000)
    user.read_until("done")  # before, the window is that of the pipe, not the shell's
    user.resize(132, 43)
    user.read_until("43 132")
    # a process of the job says so itself: before, the key may meet the shell alone
    user.type("\rsh -c \"echo be''gun; exec cat\"\r")
    user.read_until("begun")
    user.type("\x03")
    # what is typed before the prompt may be dropped with what the key interrupts
    user.read_until("# ")
    user.type("exit 7\r")
    assert user.finish() == 7
    assert user.present_modes() == user.modes


@pytest.mark.parametrize("end", ["escape", "signal", "kill"])
def test_what_ran_there_ends_with_it(start, server, end):
    user = start("work")
    user.read_until("# ")
    user.type("sleep 1000\r")
    wait_until(lambda: sleeps(server), "sleep in the VM")
    if end == "escape":
        user.type("\r~.")
    else:
        user.signal({"signal": signal.SIGTERM, "kill": signal.SIGKILL}[end])
    assert user.finish() == {"escape": 255, "signal": 2, "kill": -9}[end]
    if end != "kill":
        assert user.present_modes() == user.modes
    wait_until(lambda: not sleeps(server), "end of sleep in the VM")


def test_why_there_is_none_is_told(start):
    user = start("nobody")
    user.read_until("there is no VM 'nobody' that runs commands")
    assert user.finish() == 126
    assert user.present_modes() == user.modes
