"""The end of a domain's QEMU, as libvirt sees it."""

import os
import socket
import subprocess
import sys
import threading

import pytest

from qubes_itests.hypervisor.qemu_process import kill_qemu

#: Seconds in which what does not wait has ended.
SOON = 0.1


@pytest.fixture
def qemu(tmp_path):
    """Yield the number of a process that looks like a QEMU, and a connection to it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", "input()", "guest=work,debug-threads=on"],
            stdin=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        (tmp_path / "work.pid").write_text(f"{process.pid}\n")
        ours.setblocking(False)
        yield process.pid, ours
        process.kill()
        process.stdin.close()
        process.wait()


def test_connections_end_when_the_process_can_be_signalled_no_more(qemu, tmp_path):
    pid, connection = qemu
    killer = threading.Thread(target=kill_qemu, args=(tmp_path / "work.pid", "work"))
    killer.start()
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    killer.join(SOON)
    assert killer.is_alive(), "it did not wait until the process was waited for"
    with pytest.raises(BlockingIOError):
        connection.recv(1)
    os.waitpid(pid, 0)
    killer.join()
    assert connection.recv(1) == b""


def test_process_of_another_domain_is_left_alone(qemu, tmp_path):
    pid, _ = qemu
    kill_qemu(tmp_path / "work.pid", "wor")
    assert os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG) is None
