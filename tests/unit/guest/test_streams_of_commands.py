"""Which streams of a command a VM's caller has, as for any subprocess."""

import asyncio
import os
import subprocess
from subprocess import DEVNULL, PIPE, STDOUT
from types import SimpleNamespace

import pytest
import pytest_asyncio

from qubes_itests.core.exc import QubesValueError
from qubes_itests.core.vm.commands import Commands
from qubes_itests.core.vm.qubesvm import QubesVM

pytestmark = pytest.mark.asyncio

COMMAND = "cat; echo out; echo err >&2"


class OverAgent(QubesVM):
    """What of a VM runs commands."""

    name = "work"

    def __init__(self, agent):
        self.life = SimpleNamespace(agent=agent, is_paused=False)
        self.commands = Commands(self)


@pytest_asyncio.fixture
async def vm(real):
    agent, _ = await real()
    return OverAgent(agent)


@pytest.mark.parametrize("nothing", [None, DEVNULL])
async def test_an_output_that_nobody_wants_is_none_and_stops_nothing(vm, nothing):
    """Also more of it than fits any buffer."""
    command = f"head -c 9000000 /dev/zero >&2; {COMMAND}"
    done = await vm.run_for_stdio(command, input=b"in\n", stderr=nothing)
    assert done == (b"in\nout\n", b"")
    process = await vm.run(COMMAND, stdin=PIPE, stderr=PIPE, stdout=nothing)
    assert await process.communicate(b"in\n") == (None, b"err\n")
    process = await vm.run(f"{COMMAND}; exit 3")
    assert await process.communicate() == (None, None)
    assert process.returncode == 3


async def test_without_input_it_is_at_its_end(vm):
    process = await vm.run(COMMAND, stdout=PIPE)
    assert await process.stdout.read() == b"out\n"
    assert await process.wait() == 0


@pytest.mark.parametrize(
    "streams",
    [
        {"stdout": 12_345},
        {"stdout": subprocess.STDOUT},
        {"stdin": "file"},
        {"cwd": "/"},
    ],
)
async def test_what_it_cannot_have_is_refused(vm, streams):
    """And not taken for nothing: the caller would wait for it."""
    with pytest.raises(QubesValueError, match=next(iter(streams))):
        await vm.run("cat", **streams)


async def test_both_outputs_may_be_one(vm):
    """Also more of it than fits any buffer; in order as far as it came in order."""
    lines = "for i in 1 2 3; do head -c 400000 /dev/zero; echo x; done"
    command = f"({lines}) >&2; {lines}"
    process = await vm.run(command, stdout=PIPE, stderr=STDOUT)
    stdout, stderr = await process.communicate()
    assert (len(stdout), stderr) == (2_400_012, None)
    process = await vm.run(COMMAND, stderr=STDOUT)
    assert await process.communicate() == (None, None)


async def test_a_file_of_the_host_is_read_and_written(vm, tmp_path):
    """What it wrote is there when it has ended; the files may be closed at once."""
    data = bytes(range(256)) * 10_000
    (tmp_path / "in").write_bytes(data)
    with (tmp_path / "in").open("rb") as source, (tmp_path / "out").open("wb") as out:
        process = await vm.run(f"{COMMAND}", stdin=source, stdout=out, stderr=STDOUT)
    assert await process.wait() == 0
    # which of two outputs comes first nobody knows
    got = (tmp_path / "out").read_bytes().replace(b"err\n", b"", 1)
    assert got == data + b"out\n"


async def test_descriptors_of_pipes_connect_it_with_another_process(vm):
    """They stay as they are for others who have them: they block."""
    (there_out, here_in), (here_out, there_in) = os.pipe(), os.pipe()
    process = await vm.run("cat", stdin=there_out, stdout=there_in)
    assert os.get_blocking(there_out)
    assert os.get_blocking(there_in)
    for descriptor in (there_out, there_in):
        os.close(descriptor)
    local = await asyncio.create_subprocess_exec(
        *("sh", "-c", "(head -c 3000000 /dev/zero) & exec >&-; wc -c >&2"),
        stdin=here_out,
        stdout=here_in,
        stderr=PIPE,
    )
    for descriptor in (here_in, here_out):
        os.close(descriptor)
    assert (await local.communicate())[1] == b"3000000\n"
    assert await process.wait() == 0


async def test_input_that_never_ends_is_not_waited_for(vm):
    """The command does not read it, and ends."""
    reading, writing = os.pipe()
    process = await vm.run("echo done", stdin=reading, stdout=PIPE)
    os.close(reading)
    assert await process.communicate() == (b"done\n", None)
    with pytest.raises(BrokenPipeError):
        os.write(writing, b"nobody reads it any more")
    os.close(writing)
