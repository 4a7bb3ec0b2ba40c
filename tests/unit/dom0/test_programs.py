"""The programs of dom0, from where they are called."""

import asyncio
import os
import subprocess
from types import SimpleNamespace

import pytest
from conditions import wait_until

from qubes_itests.dom0.programs import PROGRAMS, Programs
from qubes_itests.portal import Portal

TOLD = b"systemctl: there is no systemd here for 'stop sshd'\n"


@pytest.fixture
def call(tmp_path):
    """Return a function that starts a program, with the output for its errors."""
    programs = Programs(SimpleNamespace(directory=tmp_path))
    with Portal() as portal:
        portal.run(programs.__aenter__())
        variables = {**os.environ, **programs.variables()}
        yield lambda stderr: subprocess.Popen(
            [PROGRAMS / "systemctl", "stop", "sshd"],
            stdin=subprocess.DEVNULL,
            env=variables,
            stderr=stderr,
        )
        portal.run(programs.__aexit__())


def fill(pipe):
    """Write until there is room for nothing more; return how much."""
    os.set_blocking(pipe, False)
    size = 0
    try:
        while True:
            size += os.write(pipe, bytes(1 << 16))
    except BlockingIOError:
        os.set_blocking(pipe, True)
        return size


def test_one_whose_errors_nobody_reads_holds_up_no_other(call):
    reader, writer = os.pipe()
    size = fill(writer)
    with os.fdopen(reader, "rb") as errors, call(writer) as first:
        os.close(writer)
        try:
            # when it has handed that over
            mine = f"/proc/{first.pid}/fd/2"
            wait_until(lambda: not os.path.lexists(mine), "handing over")
            with call(subprocess.PIPE) as second:
                assert second.communicate(timeout=300) == (None, TOLD)
                assert second.returncode == 2
            assert first.poll() is None
        finally:
            said = errors.read()
    assert said == bytes(size) + TOLD
    assert first.returncode == 2


def test_a_start_on_a_busy_machine_has_the_time_that_it_has_on_our_core(
    tmp_path, monkeypatch
):
    class Guest:
        is_active = True

        async def agent(self):
            await asyncio.Future()

    slow = SimpleNamespace(slowness=0.0001)
    guests = {"work": Guest()}
    machine = SimpleNamespace(directory=tmp_path, hypervisor=slow, find=guests.get)
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {0, 1})
    monkeypatch.setattr("os.getloadavg", lambda: (5.0, 0.0, 0.0))
    programs = Programs(machine)
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as errors, programs._socket:
        with os.fdopen(writer, "wb"):
            words, fds = ["-q", "1", "work", "user"], [writer] * 3
            assert asyncio.run(programs._qrexec_daemon(words, {}, fds)) == 3
        assert errors.read() == b"no agent within 0.015 s\n"
