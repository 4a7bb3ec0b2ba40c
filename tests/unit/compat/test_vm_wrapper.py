"""The synchronous VM and its processes, over processes of this machine."""

import copy
import signal
import subprocess

import pytest
from conditions import deadlines

from qubes_itests.compat_core2 import ProcessWrapper, VMWrapper
from qubes_itests.core.exc import QubesVMNotRunningError
from qubes_itests.exc import DeadlineError
from qubes_itests.portal import PortalError


@pytest.fixture
def vm(fake_vm, portal):
    return VMWrapper(fake_vm, loop=portal.facade)


@pytest.fixture
def started(vm):
    vm.start()
    return vm


def test_it_is_the_vm(vm, fake_vm, portal):
    same = VMWrapper(vm, loop=portal.facade)
    assert vm == fake_vm
    assert fake_vm == vm
    assert vm == same
    assert same in {fake_vm: 1}
    assert hash(vm) == hash(fake_vm)
    assert str(vm) == "fake"
    assert vm._vm is fake_vm
    assert same._vm is fake_vm
    assert "default_user" in dir(vm)
    assert copy.copy(vm) == vm
    with pytest.raises(AttributeError, match="nothing"):
        _ = vm.nothing


def test_properties_are_those_of_the_vm(vm, fake_vm):
    """What is set is a VM, not a wrapper: it stays in the VM's property."""
    vm.netvm = vm
    assert fake_vm.netvm is fake_vm
    vm.label = "red"
    assert fake_vm.label == "red"
    del vm.label
    assert not hasattr(fake_vm, "label")


def test_life_is_synchronous(vm, portal):
    assert vm.start(start_guid=False) is vm
    assert vm.is_running()
    vm.shutdown(wait=True)
    assert not vm.is_running()
    vm.start()
    vm.kill()
    assert not vm.is_running()
    vm.start()
    portal.facade.run_until_complete(vm.kill())
    assert not vm.is_running()


def test_disks_are_coroutines(vm, fake_vm, portal):
    run = portal.facade.run_until_complete
    run(vm.create_on_disk())
    run(vm.clone_disk_files(vm))
    run(vm.remove_from_disk())
    assert fake_vm.calls == [
        "create_on_disk",
        ("clone_disk_files", fake_vm),
        "remove_from_disk",
    ]


def test_run_and_wait(started, fake_vm):
    assert started.run("true", wait=True) == 0
    assert started.run("exit 42", wait=True, user="root", gui=True) == 42
    assert fake_vm.calls == [("true", None), ("exit 42", "root")]
    # with input closed, or this would never end
    assert started.run("cat", wait=True) == 0


def test_run_needs_a_running_vm(vm):
    with pytest.raises(QubesVMNotRunningError):
        vm.run("true", wait=True)


def test_a_vm_that_goes_away_is_an_exit_status(started, fake_vm):
    async def gone(*_args, **_kwargs):
        raise ConnectionResetError

    fake_vm.run = gone
    assert started.run("poweroff", wait=True) == 255


def test_fire_and_forget(started, tmp_path):
    fifo = tmp_path / "fifo"
    subprocess.run(["mkfifo", fifo], check=True)
    assert started.run(f"echo there > {fifo}") is None
    assert fifo.read_text() == "there\n"


def test_process_with_and_without_stderr(started):
    command = "cat; echo err >&2; exit 3"
    process = started.run(command, passio_popen=True)
    assert isinstance(process, ProcessWrapper)
    assert process.stderr is None
    assert process.communicate(b"in") == (b"in", None)
    process = started.run(command, passio_popen=True, passio_stderr=True)
    assert process.communicate() == (b"", b"err\n")
    assert process.returncode == 3


def test_a_process_that_does_not_read_is_no_error(started):
    process = started.run("exec 0<&-; echo done", passio_popen=True)
    assert process.communicate(b"x" * 1_000_000) == (b"done\n", None)


def test_process_step_by_step(started, portal):
    run = portal.facade.run_until_complete
    process = started.run("cat", passio_popen=True)
    assert process.returncode is None
    for end in (process.stdin.flush, lambda: run(process.stdin.drain())):
        process.stdin.write(b"line\n")
        end()
        assert run(process.stdout.readline()) == b"line\n"
    process.stdin.drain()  # need not be awaited
    process.stdin.close()
    assert process.wait() == 0
    assert run(process.wait()) == 0


@pytest.mark.parametrize(
    ("send", "number"),
    [
        (lambda p: p.terminate(), signal.SIGTERM),
        (lambda p: p.kill(), signal.SIGKILL),
        (lambda p: p.send_signal(signal.SIGINT), signal.SIGINT),
    ],
)
def test_signals(started, send, number):
    process = started.run("exec sleep 1000", passio_popen=True)
    send(process)
    assert process.wait() == -number
    send(process)  # as with Popen: it has ended, which is well


def test_services(started, fake_vm):
    fake_vm.services = {"t.Wc": "exit $(wc -c)", "t.Cat": "cat; echo err >&2; exit 2"}
    assert started.run_service("t.Wc", input="four") == 4
    assert started.run_service("t.Wc", input=b"four!") == 5
    assert started.run_service("t.Wc", wait=True) == 0
    assert started.run_service("t.Missing") == 127
    process = started.run_service("t.Cat", passio_popen=True, passio_stderr=True)
    assert process.communicate(b"in") == (b"in", b"err\n")
    assert process.returncode == 2


def test_service_fire_and_forget_with_input(started, fake_vm, tmp_path):
    fifo = tmp_path / "fifo"
    subprocess.run(["mkfifo", fifo], check=True)
    fake_vm.services = {"t.Copy": f"cat > {fifo}"}
    assert started.run_service("t.Copy", wait=False, input="text") is None
    assert fifo.read_text() == "text"


def test_from_the_loops_thread_it_raises(started, portal):
    """And the coroutine that was made for the call is closed, not forgotten."""
    process = started.run("cat", passio_popen=True)
    calls = [
        started.start,
        started.kill,
        lambda: started.run("true", wait=True),
        lambda: started.run("true"),
        lambda: started.run_service("t.Any"),
        process.communicate,
        process.wait,
        process.stdin.flush,
    ]

    async def call_all():
        for call in calls:
            with pytest.raises(PortalError):
                call()

    portal.run(call_all(), timeout=300)
    process.communicate()


def test_succeed_returns_the_output_or_says_what_was_wrong(started):
    assert started.succeed("echo a; printf '\\377'") == "a\n\\xff"
    with pytest.raises(AssertionError) as failed:
        started.succeed("echo 'no such \033[2J thing' >&2; exit 7")
    assert str(failed.value) == (
        "\"echo 'no such \\x1b[2J thing' >&2; exit 7\" in fake ended with status 7:\n"
        "| no such \\x1b[2J thing"
    )
    with pytest.raises(
        DeadlineError, match=r"no end of 'exec sleep 60' in fake within 0\.1 s"
    ):
        started.succeed("exec sleep 60", timeout=0.1)


def test_wait_until_repeats_a_command_until_it_succeeds(started, tmp_path):
    file = tmp_path / "attempts"
    command = f"echo x >> {file}; test $(wc -l < {file}) -ge 3 && echo done"
    assert started.wait_until(command) == "done\n"
    assert file.read_text() == "x\n" * 3


def test_wait_until_tells_the_last_attempt(started):
    for seconds in deadlines(0.3):
        with pytest.raises(DeadlineError) as late:
            started.wait_until("echo not yet >&2; exit 3", timeout=seconds)
        if "status" in str(late.value):
            break
    assert str(late.value).endswith("last seen:\n| status 3\n| not yet")
    with pytest.raises(DeadlineError, match="it did not end"):
        started.wait_until("exec sleep 60", timeout=0.1)
