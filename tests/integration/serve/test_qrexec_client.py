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


def wait_for(condition, what, timeout=300):
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
        process.wait(300)
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


@pytest.mark.parametrize("option", [["-p"], ["--prefix-data"], ["--prefix"]])
def test_a_prefix_goes_before_the_input(server, option):
    """The tools of today send the command of a shell service so."""
    command = "echo $((6*7)); exec cat; exit"
    words = (*option, command + "\n", "DEFAULT:QUBESRPC qubes.VMShell+ dom0")
    assert server.run("-d", "work", *words, data=b"rest").stdout == b"42\nrest"
    long = b"x" * 100_000 + b"\xff\n"
    done = server.run("-d", "work", "-p", long, "user:cat", data=b"end")
    assert done.stdout == long + b"end"


def test_options_may_follow_the_command(server):
    done = server.run(
        "user:printf '\033'; exit 4", "-d", "work", "-E", "-t", "-w", "60"
    )
    assert (done.returncode, done.stdout) == (0, b"_")


def test_a_socket_takes_both_streams(server):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = server.command("--use-stdin-socket", "-d", "work", "user:cat; exit 5")
        with subprocess.Popen(command, stdin=theirs, stdout=subprocess.DEVNULL) as done:
            theirs.close()
            ours.settimeout(300)
            ours.sendall(b"there and back")
            ours.shutdown(socket.SHUT_WR)
            assert ours.makefile("rb").read() == b"there and back"
        assert done.returncode == 5


def test_the_vm_may_be_killed_at_the_end(server):
    server.client.call(
        "admin.vm.Create.AppVM", argument="tiny", payload=b"name=brief label=red"
    )
    server.client.call("admin.vm.Start", "brief")
    assert server.run("-k", "-d", "brief", "user:exit 3").returncode == 3
    assert b"state=Halted" in server.client.call("admin.vm.List", "brief")
    done = server.run("-k", "-d", "brief", "user:exit 3")
    assert done.returncode == 255
    assert b"-k: 'brief' could not be killed" in done.stderr
    server.client.call("admin.vm.Remove", "brief")


def test_a_vm_has_a_uuid_and_a_server_a_directory(server):
    (line,) = server.client.call("admin.vm.List", "work").split(b"\n")[:-1]
    uuid = line.rpartition(b"uuid=")[2].decode()
    words = ("--socket-dir", server.socket.parent, "-d", f"uuid:{uuid}")
    assert server.run(*words, "root:id -un").stdout == b"root\n"
    done = server.run("--socket-dir=/none", "-d", "work", "root:id")
    assert done.returncode == 255
    assert b"No such file" in done.stderr


def test_services_of_dom0_run_on_the_machine_of_the_caller(server):
    call = ("-d", "dom0", "DEFAULT:QUBESRPC qubes.VMShell+ dom0")
    done = server.run("-p", "read word; echo $word $QREXEC_REMOTE_DOMAIN\n", *call)
    assert (done.returncode, done.stdout) == (0, b"dom0\n")
    shell = b"printf '\\033 here'; echo no >&2; cat; exit 3\n"
    done = server.run("-t", "-T", "-d", "@adminvm", call[2], data=shell + b"more")
    assert (done.returncode, done.stdout, done.stderr) == (3, b"_ heremore", b"no\n")
    assert server.run("-E", *call, data=b"exit 3\n").returncode == 0
    done = server.run("-d", "dom0", "DEFAULT:QUBESRPC no.Such+x dom0")
    assert (done.returncode, done.stderr) == (
        127,
        b"qrexec-client: dom0 has no service no.Such+x\n",
    )
    done = server.run("-l", "QUBESRPC qubes.VMShell dom0", "-d", "work", "user:echo id")
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("vm", "request_", "status", "said"),
    [
        ("none", "user:id", 126, "there is no VM 'none' that runs commands"),
        ("tiny", "user:id", 255, "tiny"),
        ("work", "user", 126, "expected USER:COMMAND, got 'user'"),
        ("work", "user:QUBESRPC no.Such dom0", 127, "there is no service no.Such"),
        ("work", "user:" + 70000 * "x", 126, "65536 bytes at most"),
        ("work", "user:QUBESRPC  qubes.VMShell dom0", 126, "QUBESRPC SERVICE VM"),
        ("work", "user:QUBESRPC qubes.VMShell dom0 x", 126, "QUBESRPC SERVICE VM"),
        ("work", "user:QUBESRPC", 126, "QUBESRPC SERVICE VM"),
        ("work\x1b[31m", "user:id", 126, r"there is no VM 'work\x1b[31m' that"),
        (b"work\xff", "user:id", 126, "there is no VM 'work\ufffd' that"),
        ("uuid:none", "user:id", 126, "there is no VM 'uuid:none' that"),
        ("dom0", "user:id", 2, "in dom0 expected 'DEFAULT:QUBESRPC"),
        ("dom0", "root:QUBESRPC qubes.VMShell+ dom0", 2, "in dom0 expected"),
        ("dom0", "DEFAULT:QUBESRPC ../../bin/id dom0", 2, "'QUBESRPC ../../bin/id"),
        ("dom0", "DEFAULT:QUBESRPC .. dom0", 127, "no service .."),
    ],
)
def test_what_cannot_be_is_said(server, vm, request_, status, said):
    done = server.run("-d", vm, request_)
    assert said in done.stderr.decode()
    assert done.returncode == status


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("-d", "work"), "expected -d VM and one USER:COMMAND, got []"),
        (("user:id",), "expected -d VM and one"),
        (("-d", "work", "user:id", "more\x1b"), r"'more\x1b'"),
        (("-x", "-d", "work", "user:id"), "'option -x not recognized'"),
        (("-\x1b", "-d", "work", "user:id"), r"'option -\x1b not recognized'"),
        (("--evil\x1b=1", "-d", "work", "user:id"), r"'option --evil\x1b not"),
        (("-p", "a", "--prefix=b", "-d", "work", "user:id"), "-p can be given once"),
        (("-w", "-1", "-d", "work", "user:id"), "-w: expected a number"),
        (("-w", "9999999999", "-d", "work", "user:id"), "up to 2147483647"),
        (("-e", "-l", "cat", "-d", "work", "user:id"), "one of -e and -l"),
        (("-c", "1,work", "-d", "work", "user:id"), "REQUEST,VM,ID"),
        (("-c", "1,work,x", "-d", "work", "user:id"), "-c: expected a number"),
        (("-c", "7,work,1", "-d", "work", "user:id"), "no call waits as '7'"),
        (("--use-stdin-socket", "-d", "work", "user:id"), "stdin is no socket"),
        (("--use-stdin-socket", "-l", "cat", "-d", "work", "user:id"), "one of -l and"),
        (("-l", "cat", "-d", "dom0", "DEFAULT:QUBESRPC a dom0"), "-l cannot be used"),
        (("-l", "QUBESRPC ../a", "-d", "work", "user:id"), "expected QUBESRPC SERVICE"),
    ],
)
def test_wrong_usage_is_said(server, words, said):
    done = server.run(*words)
    assert done.returncode == 2
    assert done.stderr.startswith(b"qrexec-client: ")
    assert said in done.stderr.decode()
    assert b"\x1b" not in done.stderr


def test_it_shows_its_options(server):
    for words in (("-h",), ("--help", "-x")):
        done = server.run(*words)
        assert done.returncode == (2 if "-x" in words else 0)
    assert b"--prefix-data" in server.run("--help").stdout


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
        connection.settimeout(300)
        connection.connect(str(server.socket.with_name("qrexec.sock")))
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert len(answer) < 1000
    assert server.run("-d", "work", "user:echo alive").stdout == b"alive\n"
    log = server.socket.with_name("log").read_text()
    assert not re.search(r"Traceback|never retrieved", log)
