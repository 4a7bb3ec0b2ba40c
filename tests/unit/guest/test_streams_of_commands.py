"""Which streams of a command a VM's caller has, as for any subprocess."""

import subprocess
from subprocess import DEVNULL, PIPE

import pytest
import pytest_asyncio

from qubes_itests.core.exc import QubesValueError
from qubes_itests.core.vm.execution import ExecutionMixin

pytestmark = pytest.mark.asyncio

COMMAND = "cat; echo out; echo err >&2"


class OverAgent(ExecutionMixin):
    """What of a VM runs commands."""

    name = "work"

    def __init__(self, agent):
        self.agent = agent

    def is_paused(self):
        return False


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
    [{"stdout": 1}, {"stderr": subprocess.STDOUT}, {"stdin": 0}, {"cwd": "/"}],
)
async def test_what_it_cannot_have_is_refused(vm, streams):
    """And not taken for nothing: the caller would wait for it."""
    with pytest.raises(QubesValueError, match=next(iter(streams))):
        await vm.run("cat", **streams)
