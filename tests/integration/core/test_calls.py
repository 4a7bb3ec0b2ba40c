"""Calls between VMs: policy decides, streams connect, the exit status comes back."""

import pytest

ECHO = '#!/bin/sh\necho "$QREXEC_REMOTE_DOMAIN ${1-}"\ncat\nexit ${1:-0}\n'


@pytest.fixture
def pair(make_vm, run):
    work, vault = make_vm("work"), make_vm("vault")
    run(work.start())
    run(vault.start())
    run(
        vault.run_for_stdio(
            "cat > /etc/qubes-rpc/test.Echo && chmod +x /etc/qubes-rpc/test.Echo",
            user="root",
            input=ECHO.encode(),
        )
    )
    return work, vault


def call(run, vm, command, data=b""):
    async def communicate():
        process = await vm.run(command, stdin=-1, stdout=-1, stderr=-1)
        stdout, stderr = await process.communicate(data)
        return process.returncode, stdout, stderr

    return run(communicate())


def test_denied_by_default(pair, run):
    work, _ = pair
    status, stdout, _ = call(run, work, "qrexec-client-vm vault test.Echo")
    assert (status, stdout) == (126, b"")


def test_allowed_call_echoes_and_knows_its_caller(app, pair, run):
    app.policy.add_rule("test.Echo * work vault allow")
    status, stdout, _ = call(run, pair[0], "qrexec-client-vm vault test.Echo", b"hi\n")
    assert (status, stdout) == (0, b"work \nhi\n")


def test_argument_and_exit_status(app, pair, run):
    app.policy.add_rule("test.Echo +7 work vault allow")
    status, stdout, _ = call(run, pair[0], "qrexec-client-vm vault test.Echo+7")
    assert (status, stdout) == (7, b"work 7\n")
    status, _, _ = call(run, pair[0], "qrexec-client-vm vault test.Echo+8")
    assert status == 126


def test_service_that_is_not_there(app, pair, run):
    app.policy.add_rule("test.None * work vault allow")
    assert call(run, pair[0], "qrexec-client-vm vault test.None")[0] == 127


def test_redirection_and_user(app, pair, run):
    app.policy.add_rule("test.Who * work @default allow target=vault user=root")
    run(
        pair[1].run_for_stdio(
            "printf '#!/bin/sh\\nid -un; hostname\\n' > /etc/qubes-rpc/test.Who;"
            " chmod +x /etc/qubes-rpc/test.Who",
            user="root",
        )
    )
    _, stdout, _ = call(run, pair[0], "qrexec-client-vm @default test.Who")
    assert stdout == b"root\nvault\n"


def test_local_command_talks_to_the_service(app, pair, run):
    app.policy.add_rule("test.Echo * work vault allow")
    script = 'echo ask; exec 1>&-; cat >&"$SAVED_FD_1"'
    status, stdout, stderr = call(
        run, pair[0], f"qrexec-client-vm vault test.Echo /bin/sh -c '{script}'"
    )
    assert (status, stdout) == (0, b"work \nask\n"), stderr


def test_halted_target_is_started(app, make_vm, pair, run):
    third = make_vm("third")
    app.policy.add_rule("qubes.WaitForSession * work third allow")
    status, _, _ = call(run, pair[0], "qrexec-client-vm third qubes.WaitForSession")
    assert status == 0
    assert third.is_running()


def test_big_streams_both_ways(app, pair, run):
    app.policy.add_rule("test.Echo * work vault allow")
    data = bytes(range(256)) * 4096 * 4
    status, stdout, _ = call(run, pair[0], "qrexec-client-vm vault test.Echo", data)
    assert status == 0
    assert stdout == b"work \n" + data


def test_service_of_dom0(app, pair, run):
    async def shout(vm, call):
        call.stdout.write(f"{vm}: ".encode() + (await call.stdin.read()).upper())
        await call.stdout.drain()
        return 5

    app.host_services["test.Shout"] = shout
    app.policy.add_rule("test.Shout * work dom0 allow")
    status, stdout, _ = call(run, pair[0], "qrexec-client-vm dom0 test.Shout", b"hey")
    assert (status, stdout) == (5, b"work: HEY")


@pytest.mark.parametrize("target", ["../x", "a" * 100, "dom0; rm", "@dispvm", "gone"])
def test_targets_that_cannot_be_are_refused(pair, run, target):
    assert call(run, pair[0], f"qrexec-client-vm '{target}' test.Echo")[0] == 126
