"""Commands and services in a real guest: streams, status, users, many at once."""

import asyncio
import signal

import pytest

from qubes_itests.guest.exc import GuestGoneError
from qubes_itests.guest.link.relay import relay


@pytest.fixture
def agent(machines, warm, hypervisor_portal):
    _, agent = hypervisor_portal.run(machines.boot(machines.spec("vm"), warm=warm))
    yield agent
    hypervisor_portal.run(agent.close())


async def test_streams_status_and_signals(agent):
    process = await agent.spawn("cat; echo err >&2; exit 5")
    assert await process.communicate(b"in") == (b"in", b"err\n")
    assert process.returncode == 5
    process = await agent.spawn("kill -9 $$")
    await process.communicate()
    assert process.returncode == -signal.SIGKILL
    process = await agent.spawn("no-such-command")
    _, stderr = await process.communicate()
    assert process.returncode == 127
    assert b"not found" in stderr


async def test_64_mib_both_ways_arrive_whole(agent):
    data = bytes(range(256)) * (64 << 12)
    process = await agent.spawn("cat")
    stdout, _ = await process.communicate(data)
    assert stdout == data


async def test_fifty_commands_at_once(agent):
    processes = [
        await agent.spawn(f"cat; echo {n}; echo e{n} >&2; exit {n}") for n in range(50)
    ]
    outputs = await asyncio.gather(*(p.communicate(b"in ") for p in processes))
    assert outputs == [(f"in {n}\n".encode(), f"e{n}\n".encode()) for n in range(50)]
    assert [p.returncode for p in processes] == list(range(50))


async def test_a_slow_reader_blocks_no_other_stream(agent):
    stuck = await agent.spawn("cat /dev/zero")
    stuck_input = await agent.spawn("sleep 60")
    stuck_input.stdin.write(bytes(8 << 20))
    await stuck.stdout.readexactly(1)
    process = await agent.spawn("head -c 8000000 /dev/zero")
    assert len((await process.communicate())[0]) == 8_000_000
    for other in (stuck, stuck_input):
        other.kill()


@pytest.mark.parametrize(
    ("user", "line"), [("root", "0 /root"), ("user", "1000 /home/user")]
)
async def test_users(agent, sh, user, line):
    assert await sh(agent, "echo $(id -u) $HOME", user=user) == line
    assert await sh(agent, "stat -c %a $XDG_RUNTIME_DIR", user=user) == "700"
    # scheduled as any process is (SCHED_OTHER), whatever the agent is
    assert await sh(agent, "cut -d' ' -f41 /proc/self/stat", user=user) == "0"


@pytest.mark.parametrize("service", ["qubes.VMShell", "qubes.VMRootShell"])
async def test_what_follows_a_command_is_for_the_command(agent, service):
    """The shell reads not a byte more than its line, although all comes at once."""
    shell = await agent.spawn_service(service, source="dom0")
    data = b"cat; exit 5\n" + b"what it is to read\n" * 1000
    output, _ = await shell.communicate(data)
    assert output == data.partition(b"\n")[2]
    assert shell.returncode == 5


#: All of a process that a login shell before it could have made otherwise.
SEEN = """#!/bin/sh
tr '\\0' '\\n' </proc/$$/environ | sort
env | sort
umask; ulimit -a; pwd; echo "$0 $# $*"
grep -E '^(Sig|Cap|Groups|Name|NoNewPrivs)' /proc/$$/status
tr '\\0' ' ' </proc/$$/cmdline
"""


async def serve(agent, service, **options):
    process = await agent.spawn_service(service, source="work", **options)
    stdout, stderr = await process.communicate()
    return process.returncode, stdout.decode(), stderr.decode()


async def install(sh, agent, name, text):
    path = f"/etc/qubes-rpc/{name}"
    quoted = text.replace("'", "'\\''")
    await sh(agent, f"printf '%s' '{quoted}' >{path}; chmod +x {path}", user="root")


@pytest.mark.parametrize("user", ["root", "user"])
async def test_a_service_is_as_the_login_shell_would_leave_it(agent, sh, user):
    """The agent spares the shell while the profile is the template's own."""
    await install(sh, agent, "test.Seen", SEEN)
    direct = await serve(agent, "test.Seen+a", user=user)
    assert "SHLVL=1" in direct[1].splitlines()
    await sh(agent, "echo '#' >>/etc/profile", user="root")
    assert await serve(agent, "test.Seen+a", user=user) == direct


@pytest.mark.parametrize(
    "place", ["/etc/profile", "/etc/profile.d/x.sh", "/home/user/.profile"]
)
async def test_services_run_with_what_a_profile_sets(agent, sh, place):
    await install(sh, agent, "test.Ask", '#!/bin/sh\necho "<$ASKED>"\n')
    assert (await serve(agent, "test.Ask"))[1] == "<>\n"
    line = f"mkdir -p /etc/profile.d; echo 'export ASKED=$USER' >>{place}"
    await sh(agent, line, user="root")
    assert (await serve(agent, "test.Ask"))[1] == "<user>\n"


async def test_what_cannot_be_executed_is_left_to_the_shell(agent, sh):
    await install(sh, agent, "test.Plain", "echo $SHLVL $1")
    await install(sh, agent, "test.Lost", "#!/no/such/program\n")
    plain, lost = await serve(agent, "test.Plain+a"), await serve(agent, "test.Lost")
    assert (plain[0], lost[0]) == (0, 127)
    await sh(agent, "echo '#' >>/etc/profile", user="root")
    assert await serve(agent, "test.Plain+a") == plain
    assert await serve(agent, "test.Lost") == lost


async def test_services_of_the_template(agent):
    shell = await agent.spawn_service("qubes.VMShell", source="dom0")
    assert (await shell.communicate(b"echo $QREXEC_REMOTE_DOMAIN; exit 4"))[0] == (
        b"dom0\n"
    )
    assert shell.returncode == 4
    root = await agent.spawn_service("qubes.VMRootShell", source="dom0")
    assert (await root.communicate(b"id -u"))[0] == b"0\n"
    words = await agent.spawn_service("qubes.VMExec+echo+a-20b+--x", source="dom0")
    assert (await words.communicate())[0] == b"a b -x\n"
    wait = await agent.spawn_service("qubes.WaitForSession", source="dom0")
    await wait.communicate()
    assert wait.returncode == 0
    none = await agent.spawn_service("test.None", source="dom0")
    await none.communicate()
    assert none.returncode == 127


async def test_a_call_from_one_guest_to_another(machines, warm, sh):
    async def on_call(call):
        process = await target.spawn_service(call.service, source=call.vm)
        await relay(call, process)

    async with (
        machines.running("target", warm=warm) as target,
        machines.running("source", warm=warm, on_call=on_call) as source,
    ):
        await sh(
            target,
            "cat > /etc/qubes-rpc/test.Cat; chmod 755 /etc/qubes-rpc/test.Cat",
            data=b'#!/bin/sh\necho "$QREXEC_REMOTE_DOMAIN $1" >&2\ncat\nexit 9\n',
        )
        process = await source.spawn("qrexec-client-vm target test.Cat+arg")
        data = bytes(range(256)) * (16 << 12)
        stdout, _ = await process.communicate(data)
        assert process.returncode == 9
        assert stdout == data


async def test_a_guest_that_is_killed_fails_what_is_pending(machines, warm):
    domain, agent = await machines.boot(machines.spec("vm"), warm=warm)
    process = await agent.spawn("sleep 60")
    await domain.destroy()
    with pytest.raises(GuestGoneError, match="VM vm"):
        await process.wait()
    with pytest.raises(GuestGoneError):
        await agent.spawn("true")


async def test_a_guest_that_powers_itself_off(agent):
    process = await agent.spawn("poweroff", user="root")
    with pytest.raises(GuestGoneError):
        await process.wait()
    assert await agent.wait_closed() is None


async def test_the_root_grows_with_its_volume(machines, warm, sh):
    spec = machines.spec("vm")
    with (spec.directory / "root.img").open("r+b") as file:
        file.truncate(512 << 20)
    _, agent = await machines.boot(spec, warm=warm)
    assert int(await sh(agent, "df -m / | awk 'END{print $2}'")) > 400
