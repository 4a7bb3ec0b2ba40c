"""The program that ``qvm-run`` calls, against a VM that runs."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import socket
import subprocess
import time

import pytest

SIZE = 20_000_000


def wait_for(condition, what, timeout=30):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def running(server, word):
    """Tell whether a command with this word runs in the VM."""
    done = server.run("-d", "work", "root:cat /proc/[0-9]*/cmdline | tr '\\0' '\\n'")
    return word.encode() in done.stdout.split(b"\n")


def test_streams_and_status_of_a_service(server):
    done = server.run(
        "-d",
        "work",
        "DEFAULT:QUBESRPC qubes.VMShell dom0",
        data=b"id -un; echo trouble >&2; exit 3\n",
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, b"user\n", b"trouble\n")


def test_commands_and_users(server):
    assert server.run("-d", "work", "root:id -un").stdout == b"root\n"
    assert server.run("-d", "work", "nogui:x:id").returncode == 127
    assert server.run("-d", "work", "user:nogui:id -un").stdout == b"user\n"


def test_a_signal_in_the_vm_is_a_status(server):
    assert server.run("-d", "work", "user:kill -9 $$").returncode == 137


def test_much_data_comes_back_as_it_went(server):
    data = os.urandom(SIZE)
    done = server.run("-d", "work", "user:cat", data=data)
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(data).digest()


def test_a_slow_reader_slows_the_command(server):
    """What is not read stays in the VM: the daemon holds a bounded part."""
    command = server.command("-d", "work", "user:cat /dev/zero")
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.read(1000) == bytes(1000)
        assert server.run("-d", "work", "user:echo quick").stdout == b"quick\n"
        process.kill()
    wait_for(lambda: not running(server, "/dev/zero"), "end of the command")


def test_a_command_that_does_not_read_ends_all_the_same(server):
    assert server.run("-d", "work", "user:true", data=bytes(SIZE)).returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_what_ends_the_program_ends_the_command(server, number):
    word = f"{70000 + number}"
    command = server.command("-d", "work", f"user:sleep {word}")
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
        wait_for(lambda: running(server, word), "start of the command")
        process.send_signal(number)
        process.wait(10)
    wait_for(lambda: not running(server, word), "end of the command")


def test_the_command_ends_although_its_input_waits(server):
    """Nothing is read from the program any more when it is killed."""
    command = server.command("-d", "work", "user:sleep 71000")
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        wait_for(lambda: running(server, "71000"), "start of the command")
        os.set_blocking(process.stdin.fileno(), False)
        sent = last = 0
        while sent != last or not sent:
            last = sent
            for _ in range(50):
                try:
                    sent += os.write(process.stdin.fileno(), bytes(65536))
                except BlockingIOError:
                    time.sleep(0.01)
        process.kill()
    wait_for(lambda: not running(server, "71000"), "end of the command")


def test_it_need_not_be_waited_for(server):
    command = "user:sleep 1; touch /tmp/detached"
    assert server.run("-e", "-d", "work", command).returncode == 0
    wait_for(
        lambda: server.run("-d", "work", "user:ls /tmp/detached").returncode == 0,
        "file of the command",
    )


def test_a_command_of_our_own_takes_the_streams(server):
    done = server.run(
        "-l", "echo from here; exec >&-; cat >&2", "-d", "work", "user:cat; echo bye"
    )
    assert (done.returncode, done.stderr) == (0, b"from here\nbye\n")


def test_what_would_command_a_terminal_is_filtered(server):
    words = ("-t", "-T", "-d", "work", "user:printf '\\033[31mr\\n' | tee /dev/stderr")
    done = server.run(*words)
    assert (done.stdout, done.stderr) == (b"_[31mr\n", b"_[31mr\n")


@pytest.mark.parametrize(
    ("vm", "request_", "status", "said"),
    [
        ("none", "user:id", 126, "there is no VM 'none' that runs commands"),
        ("dom0", "user:id", 126, "there is no VM 'dom0' that runs commands"),
        ("tiny", "user:id", 255, "tiny"),
        ("work", "user", 126, "'user' is not USER:COMMAND"),
        ("work", "user:QUBESRPC no.Such dom0", 127, "there is no service no.Such"),
        ("work", "user:" + 70000 * "x", 126, "65536 at most"),
    ],
)
def test_what_cannot_be_is_said(server, vm, request_, status, said):
    done = server.run("-d", vm, request_)
    assert said in done.stderr.decode()
    assert done.returncode == status


def test_wrong_usage_is_said(server):
    for words in (("-d", "work"), ("user:id",), ("-x", "-d", "work", "user:id")):
        done = server.run(*words)
        assert done.returncode == 2
        assert done.stderr.startswith(b"qrexec-client: ")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01",
        b"\x01\xff\xff\xff\xff",
        b"\x01\0\0\0\x03abc",
        b"\x09\0\0\0\0",
        b"\x03\0\0\0\x01x",
        b"\x02\0\0\0\x05\xff\xfe\0\0\0",
    ],
)
def test_bytes_that_are_no_call_harm_nobody(server, data):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(str(server.socket.with_name("qrexec.sock")))
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert len(answer) < 1000
    assert server.run("-d", "work", "user:echo alive").stdout == b"alive\n"
    log = server.socket.with_name("log").read_text()
    assert not re.search(r"Traceback|never retrieved", log)
