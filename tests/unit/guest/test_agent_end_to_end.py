"""Both programs together: the host's side and the guest's program, sanitized."""

import asyncio
import signal

import pytest

from qubes_itests.guest.link.relay import relay

pytestmark = pytest.mark.asyncio


async def test_a_command_with_all_its_streams(real):
    agent, _ = await real()
    process = await agent.spawn("cat; echo err >&2; exit 5")
    assert await process.communicate(b"in") == (b"in", b"err\n")
    assert process.returncode == 5


async def test_environment_and_user(real):
    agent, _ = await real()
    process = await agent.spawn("echo $A $USER", user="root", environment={"A": "b c"})
    assert (await process.communicate())[0] == b"b c root\n"


async def test_no_such_user(real):
    agent, _ = await real()
    process = await agent.spawn("true", user="nobody-here")
    _, stderr = await process.communicate()
    assert process.returncode == 127
    assert b"nobody-here" in stderr


async def test_a_terminal_has_the_size_that_it_is_given(real):
    agent, _ = await real()
    script = "trap 'stty size; exit 4' WINCH; stty size; while :; do sleep 0.02; done"
    terminal = await agent.open_terminal(
        script, columns=80, rows=24, environment={"TERM": "vt220"}
    )
    assert await terminal.stdout.readline() == b"24 80\r\n"
    terminal.resize(65535, 1)
    assert await terminal.stdout.readline() == b"1 65535\r\n"
    assert await terminal.wait() == 4
    terminal.resize(80, 24)
    with pytest.raises(ValueError, match="expected 1 to 65535"):
        (await agent.open_terminal(columns=80, rows=24)).resize(0, 0)


async def test_a_terminal_goes_with_who_looks_at_it(real):
    agent, _ = await real()
    terminal = await agent.open_terminal("exec sleep 60", columns=80, rows=24)
    terminal.hang_up()
    assert await terminal.wait() == -signal.SIGHUP


async def test_signals_reach_the_command(real):
    agent, _ = await real()
    process = await agent.spawn("echo ready; exec sleep 60")
    assert await process.stdout.readline() == b"ready\n"
    process.terminate()
    assert await process.wait() == -signal.SIGTERM


async def test_many_bytes_both_ways_at_once(real):
    agent, _ = await real()
    data = bytes(range(256)) * (8 << 12)
    process = await agent.spawn("cat")
    stdout, stderr = await process.communicate(data)
    assert stdout == data
    assert stderr == b""


async def test_fifty_commands_each_with_its_own_output(real):
    agent, _ = await real()
    processes = [
        await agent.spawn(f"cat; echo {n}; echo e{n} >&2; exit {n}") for n in range(50)
    ]
    outputs = await asyncio.gather(*(p.communicate(b"in ") for p in processes))
    assert outputs == [(f"in {n}\n".encode(), f"e{n}\n".encode()) for n in range(50)]
    assert [p.returncode for p in processes] == list(range(50))


async def test_a_stream_that_nobody_reads_blocks_no_other(real):
    agent, _ = await real()
    stuck = await agent.spawn("cat /dev/zero")
    await stuck.stdout.readexactly(1)
    for _ in range(20):
        process = await agent.spawn("head -c 300000 /dev/zero")
        assert len((await process.communicate())[0]) == 300_000
    stuck.kill()
    await stuck.stdout.read()
    assert await stuck.wait() == -signal.SIGKILL


async def test_a_reader_that_stops_gives_the_command_sigpipe(real):
    agent, _ = await real()
    process = await agent.spawn("exec cat /dev/zero")
    await process.stdout.readexactly(10)
    process.stdout.stop()
    assert await process.wait() == -signal.SIGPIPE


async def test_a_command_that_does_not_read_its_input(real):
    agent, _ = await real()
    process = await agent.spawn("exec true")
    data = bytes(1 << 20)
    assert await process.communicate(data) == (b"", b"")
    assert process.returncode == 0


async def test_a_call_from_guest_to_guest(real):
    """The real client calls, policy-free, a service of another guest."""
    target, target_root = await real("target")
    target_root.service(
        "test.Up", 'echo "$QREXEC_REMOTE_DOMAIN $1"; tr a-z A-Z; exit 6'
    )

    async def on_call(call):
        process = await target.spawn_service(call.service, source=call.vm)
        await relay(call, process)

    _, root = await real("source", on_call=on_call)
    client = root.client("qrexec-client-vm", "target", "test.Up+arg")
    output = await asyncio.to_thread(client.communicate, b"hello")
    assert output[0] == b"source arg\nHELLO"
    assert client.returncode == 6


async def test_a_big_call_from_guest_to_guest(real):
    target, target_root = await real("target")
    target_root.service("test.Cat", "exec cat")

    async def on_call(call):
        process = await target.spawn_service(call.service, source=call.vm)
        await relay(call, process)

    _, root = await real("source", on_call=on_call)
    data = bytes(range(256)) * (8 << 12)
    client = root.client("qrexec-client-vm", "target", "test.Cat")
    output = await asyncio.to_thread(client.communicate, data)
    assert output[0] == data
    assert client.returncode == 0


async def test_a_refused_call(real):
    async def on_call(call):
        await call.refuse("denied by policy")

    _, root = await real("source", on_call=on_call)
    client = root.client("qrexec-client-vm", "target", "test.Cat")
    await asyncio.to_thread(client.communicate, b"")
    assert client.returncode == 126


async def test_a_service_in_a_caller_that_is_killed(real):
    """The service sees the end of its input and of its reader."""
    target, target_root = await real("target")
    target_root.service("test.Cat", "exec cat")
    statuses = asyncio.Queue()

    async def on_call(call):
        process = await target.spawn_service(call.service, source=call.vm)
        statuses.put_nowait(await relay(call, process))

    _, root = await real("source", on_call=on_call)
    client = root.client("qrexec-client-vm", "target", "test.Cat")
    client.stdin.write(b"x")
    client.stdin.flush()
    assert await asyncio.to_thread(client.stdout.read, 1) == b"x"
    client.kill()
    await asyncio.to_thread(client.communicate)
    assert await asyncio.wait_for(statuses.get(), 300) == 0
