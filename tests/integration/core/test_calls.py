"""Calls between VMs: policy decides, streams connect, the exit status comes back."""

import asyncio
import fcntl
import hashlib
import logging
import random
import resource
import socket
import subprocess
import termios
import time
from pathlib import Path

import pytest
from conditions import wait_until

from qubes_itests.guest.link import dom0_services

CHUNK = 1024**2

#: Bytes of a big call.
HUGE = 64 * CHUNK

ECHO = '#!/bin/sh\necho "$QREXEC_REMOTE_DOMAIN ${1-}"\ncat\nexit ${1:-0}\n'


@pytest.fixture
def work(make_vm, run):
    vm = make_vm("work")
    run(vm.start())
    return vm


@pytest.fixture
def pair(work, make_vm, run):
    vault = make_vm("vault")
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


def test_many_megabytes_arrive_as_they_were_sent(app, pair, run):
    """Both ways at once, and never more than a little of it in memory."""
    app.policy.add_rule("test.Echo * work vault allow")
    sent, received = hashlib.sha256(), hashlib.sha256()

    async def write(stdin):
        for number in range(HUGE // CHUNK):
            part = random.Random(number).randbytes(CHUNK)  # noqa: S311 - not secret
            sent.update(part)
            stdin.write(part)
            await stdin.drain()
        stdin.write_eof()

    async def read(stdout):
        assert await stdout.readline() == b"work \n"
        while part := await stdout.read(CHUNK):
            received.update(part)

    async def call_echo():
        command = "qrexec-client-vm vault test.Echo"
        process = await pair[0].run(command, stdin=-1, stdout=-1)
        await asyncio.gather(write(process.stdin), read(process.stdout))
        return await process.wait()

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert run(call_echo()) == 0
    assert received.hexdigest() == sent.hexdigest()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < HUGE // 1024 // 4


def test_service_of_dom0(app, work, run):
    async def shout(vm, call):
        call.stdout.write(f"{vm}: ".encode() + (await call.stdin.read()).upper())
        await call.stdout.drain()
        return 5

    app.host_services["test.Shout"] = shout
    app.policy.add_rule("test.Shout * work dom0 allow")
    status, stdout, _ = call(run, work, "qrexec-client-vm dom0 test.Shout", b"hey")
    assert (status, stdout) == (5, b"work: HEY")


def test_targets_that_cannot_be_are_refused(work, run):
    for target in ("../x", "a" * 100, "dom0; rm", "@dispvm", "gone"):
        command = f"qrexec-client-vm '{target}' test.Echo"
        assert call(run, work, command)[0] == 126, target


WHO = "#!/bin/sh\nid -un; hostname; echo $1; echo $QREXEC_SERVICE_FULL_NAME\n"


@pytest.fixture
def policy_file(app):
    """Write a file of the run's own policy, and return its path."""

    def write(text):
        path = app.directory / "policy.d" / "30-user.policy"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    return write


def test_policy_file_is_obeyed_and_its_changes_too(pair, run, policy_file, caplog):
    """A file redirects, sets the user, and matches one argument; then it denies."""
    caplog.set_level(logging.INFO, "qubes.policy")
    work, vault = pair
    path = policy_file("test.Who +x work @default allow target=vault user=root\n")
    install = "cat > /etc/qubes-rpc/test.Who; chmod +x /etc/qubes-rpc/test.Who"
    run(vault.run_for_stdio(install, user="root", input=WHO.encode()))
    command = "qrexec-client-vm @default test.Who+x"
    assert call(run, work, command)[:2] == (0, b"root\nvault\nx\ntest.Who+x\n")
    assert f"work -> @default: allowed to vault ({path}:1: " in caplog.text
    assert call(run, work, "qrexec-client-vm @default test.Who+y")[0] == 126

    policy_file("test.Who * work @default deny\n")
    status, _, stderr = call(run, work, command)
    assert status == 126
    assert b"denied by policy" in stderr
    assert b"deny" not in stderr.replace(b"denied by policy", b"")

    policy_file("test.Who * work @default allow target=vault\nnonsense\n")
    assert call(run, work, command)[0] == 126
    assert f"{path}:2: policy line 'nonsense'" in caplog.text


def test_target_that_must_not_be_started(app, make_vm, pair, run):
    third = make_vm("third")
    app.policy.add_rule("test.Echo * work @anyvm allow autostart=no")
    assert call(run, pair[0], "qrexec-client-vm third test.Echo")[0] == 126
    assert third.is_halted()
    assert call(run, pair[0], "qrexec-client-vm vault test.Echo")[0] == 0


def test_question_that_a_test_answers(app, pair, run):
    app.policy.add_rule("test.Echo * work @default ask default_target=vault")
    app.policy.add_rule("test.Echo * work vault allow", first=False)
    command = "qrexec-client-vm @default test.Echo"
    assert call(run, pair[0], command)[0] == 126
    app.policy.ask_handler = lambda question: question.default
    assert call(run, pair[0], command, b"hi\n")[:2] == (0, b"work \nhi\n")


def test_vm_named_by_its_uuid(app, pair, run):
    work, vault = pair
    app.policy.add_rule(f"test.Echo * uuid:{work.uuid} vault allow")
    status, stdout, _ = call(run, work, f"qrexec-client-vm uuid:{vault.uuid} test.Echo")
    assert (status, stdout) == (0, b"work \n")


def test_calls_that_no_rule_can_allow(app, work, run):
    app.policy.add_rule("* * * * allow")
    for words in ("work test.Echo", "vault ../test.Echo", "@anyvm test.Echo"):
        assert call(run, work, f"qrexec-client-vm {words}")[0] == 126, words


@pytest.fixture
def dom0(app):
    """Return where services of dom0 are; those of the test go with it."""
    app.policy.add_rule("* * @anyvm @adminvm allow")
    yield dom0_services.PLACE
    for path in dom0_services.PLACE.iterdir():
        path.unlink()


def install(path, script):
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_program_is_a_service_of_dom0(dom0, work, run):
    names = "REMOTE_DOMAIN REQUESTED_TARGET_TYPE REQUESTED_TARGET SERVICE_FULL_NAME"
    told = "".join(f"echo $QREXEC_{name};" for name in names.split())
    install(dom0 / "test.Told", f"{told} echo $1; cat; exit 3")
    install(dom0 / "test.Told+b", "readlink /proc/$$/fd/0; exit 4")
    command = "qrexec-client-vm dom0 test.Told"
    status, stdout, _ = call(run, work, f"{command}+a", b"data")
    assert (status, stdout) == (3, b"work\nname\ndom0\ntest.Told+a\na\ndata")
    status, stdout, _ = call(run, work, f"{command}+b")
    assert (status, stdout.partition(b":")[0]) == (4, b"socket")


def test_program_of_dom0_that_ends_is_the_end_for_who_writes_to_it(dom0, work, run):
    install(dom0 / "test.Abort", "exec <&-")
    script = "cat /dev/zero; echo $? >&$SAVED_FD_1"
    command = f"qrexec-client-vm dom0 test.Abort /bin/sh -c '{script}'"
    _, stdout, _ = call(run, work, command)
    assert stdout in {b"141\n", b"1\n"}


def test_program_of_dom0_may_close_its_output_and_read_on(dom0, work, run, tmp_path):
    install(dom0 / "test.Eof", f"echo said; exec >&-; cat >{tmp_path}/heard")
    script = "cat >&$SAVED_FD_1; echo heard"
    command = f"qrexec-client-vm dom0 test.Eof /bin/sh -c '{script}'"
    assert call(run, work, command)[1] == b"said\n"
    assert (tmp_path / "heard").read_text() == "heard\n"


def test_program_of_dom0_ends_with_its_caller(dom0, work, run):
    install(dom0 / "test.Long", "echo $$; exec sleep 1000 <&0")
    process = run(work.run("qrexec-client-vm dom0 test.Long", stdout=-1))
    place = Path(f"/proc/{int(run(process.stdout.readline()))}")
    assert place.exists()
    run(work.kill())
    wait_until(lambda: not place.exists(), "end of the service")


def test_socket_is_a_service_of_dom0(dom0, work, run):
    async def answer(reader, writer):
        writer.write((await reader.read()).replace(b"\0", b"|"))
        writer.close()

    async def serve():
        path = dom0 / "test.Socket"
        async with await asyncio.start_unix_server(answer, path):
            command = "qrexec-client-vm @adminvm test.Socket"
            process = await work.run(command, stdin=-1, stdout=-1)
            return await process.communicate(b"data")

    told = b"test.Socket+ work keyword adminvm|data"
    assert run(serve()) == (told, None)


def test_program_of_dom0_is_called_by_the_core(app, dom0, work, run):
    """As extensions call what their packages have put there."""
    admin, events = app.domains["dom0"], []
    admin.add_handler(
        "domain-cmd-pre-run", lambda _vm, _event, start_guid: events.append(start_guid)
    )
    script = "echo $QREXEC_REMOTE_DOMAIN $1 $(id -un); cat; echo e>&2"
    install(dom0 / "test.Told", script)
    stdio = run(admin.run_service_for_stdio("test.Told+a", input=b"data"))
    assert stdio == (b"dom0 a root\ndata", b"e\n")
    service = admin.run_service("test.Told", work, "nobody", gui=True, stdout=-1)
    assert run(run(service).communicate()) == (b"work nobody\n", None)
    with pytest.raises(subprocess.CalledProcessError, match="127") as caught:
        run(admin.run_service_for_stdio("test.None+a"))
    assert caught.value.stderr == b"dom0 has no program /etc/qubes-rpc/test.None+a\n"
    assert events == [False, True, False]


@pytest.mark.parametrize("full", [False, True])
def test_socket_of_dom0_that_reads_nothing_is_heard(dom0, work, run, full):
    """Also when so much is unread that no more fits: poll(2) says nothing then."""
    script = "cat /dev/zero; echo stopped >&$SAVED_FD_1; cat >&$SAVED_FD_1"
    command = f"qrexec-client-vm @adminvm test.Socket /bin/sh -c '{script}'"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.settimeout(300)
        listener.bind(str(dom0 / "test.Socket"))
        listener.listen()
        process = run(work.run(command, stdout=-1))
        with listener.accept()[0] as service:
            if full:
                wait_until(lambda: comes_no_more(service), "end of what fits")
            service.shutdown(socket.SHUT_RD)
            assert run(process.stdout.readline()) == b"stopped\n"
            service.sendall(b"heard")
        assert run(process.stdout.read()) == b"heard"


def comes_no_more(service):
    """Whether something has come, and for a moment nothing more."""
    counts = []
    for _ in range(2):
        # for the other side to go on in; too short a moment makes the test weaker
        time.sleep(0.3)
        counts.append(fcntl.ioctl(service, termios.FIONREAD, b"1234"))
    return counts[0] == counts[1] != bytes(4)


def test_what_cannot_serve_in_dom0_is_refused(dom0, work, run):
    install(dom0 / "test.NoProgram", "true")
    (dom0 / "test.NoProgram").chmod(0o644)
    (dom0 / "test.Folder").symlink_to("/")
    for name, status in {"NoProgram": 126, "Folder": 127, "None": 127}.items():
        assert call(run, work, f"qrexec-client-vm dom0 test.{name}")[0] == status


def test_features_that_a_guest_asks_for(app, run, sh):
    """By what packages do after an installation; what no feature may be is refused."""
    vm = app.add_new_vm("StandaloneVM", name="alone", label="red", kernel="tiny")
    run(vm.clone_disk_files(app.domains["tiny"]))
    told, saved = [], []
    vm.add_handler("features-request", lambda *_, **kwargs: told.append(kwargs))
    app.add_handler("app-saved", lambda *_, **__: saved.append(1))
    run(vm.start())
    script = "/etc/qubes/post-install.d/50-test.sh"
    line = 'qvm-features-request boot-mode.kernelopts.one="a=b c" supported-rpc.x.Y=1'
    sh(vm, f"printf '#!/bin/sh\\n%s\\n' '{line}' > {script}; chmod +x {script}")
    run(vm.run_service_for_stdio("qubes.PostInstall", user="root"))
    asked = {
        "boot-mode.kernelopts.one": "a=b c",
        "supported-rpc.qubes.WaitForRunningSystem": "1",
        "supported-rpc.x.Y": "1",
    }
    (features,) = (one.pop("untrusted_features") for one in told)
    assert features.items() >= asked.items()
    assert (told, bool(saved)) == ([{}], True)
    assert dict(vm.features).items() >= asked.items() | {
        ("qrexec", "1"),
        ("os", "Linux"),
    }
    sh(vm, "qvm-features-request boot-mode.active=one 'other=$(id)'")
    command = "qvm-features-request --commit; echo $?"
    assert sh(vm, command, user="user") == "1"
    assert len(told) == 1
    assert "boot-mode.active" not in vm.features
