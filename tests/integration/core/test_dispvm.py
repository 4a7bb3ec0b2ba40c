"""Disposable VMs on real guests: for calls and by hand; none is ever left behind."""

import asyncio
import contextlib
import os
from pathlib import Path

import pytest

from qubes_itests.core import exc
from qubes_itests.core.vm.dispvm import DispVM

#: Seconds in which a disposable VM is gone after its call.
BOUND = 300

SHELL = "qubes.VMShell"


@pytest.fixture
def base(app, make_vm):
    """Return the app's default_dispvm."""
    app.default_dispvm = make_vm("base", template_for_dispvms=True)
    return app.default_dispvm


@pytest.fixture
def kept(base, run, sh):
    """Leave a file in its private volume."""
    run(base.start())
    sh(base, "echo kept > /home/user/kept")
    run(base.shutdown(wait=True))


@pytest.fixture
def work(base, make_vm, run):  # noqa: ARG001 - first
    vm = make_vm("work")
    run(vm.start())
    return vm


@pytest.fixture
def told(app):
    """Collect what disposable VMs tell."""
    told = []

    def listen(_app, _event, vm):
        if vm.klass == "DispVM":
            vm.add_handler("domain-*", lambda vm, ev, **_: told.append((vm.name, ev)))

    app.add_handler("domain-add", listen)
    return told


@pytest.fixture
def all_gone(app, run, told):
    """Return a function that waits until there is no disposable VM, nor a trace."""
    pool = app.pools[app.default_pool]

    def traces():
        return {
            *(vm.name for vm in app.domains),
            *(domain.spec.name for domain in app.hypervisor.domains()),
            *(volume.vid.split("/")[1] for volume in pool.list_volumes()),
            # what goes meanwhile is no error for it, as it is for Path.rglob
            *(
                Path(place).name
                for place, _, files in os.walk(pool.dir_path)
                if any(".img" in name for name in files)
            ),
        }

    async def none_left(names):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(BOUND):
                while names & traces():  # noqa: ASYNC110 - files have no events
                    await asyncio.sleep(0.02)

    def all_gone(count=1):
        names = {name for name, _ in told}
        run(none_left(names))
        assert len(names) == count
        assert not names & traces()
        for name in names:
            assert told.count((name, "domain-remove-from-disk")) == 1
        assert app.problems == []

    return all_gone


async def communicate(vm, command, data=b""):
    process = await vm.run(command, stdin=-1, stdout=-1, stderr=-1)
    stdout, stderr = await process.communicate(data)
    return process.returncode, stdout, stderr


@pytest.mark.parametrize("target", ["@dispvm", "@dispvm:base"])
@pytest.mark.usefixtures("kept")
def test_a_call_has_a_vm_of_its_own(  # noqa: PLR0917
    app, work, run, all_gone, told, target
):
    app.policy.add_rule(f"{SHELL} * work {target} allow")
    script = b"hostname; cat /home/user/kept; exit 3\n"
    call = communicate(work, f"qrexec-client-vm {target} {SHELL}", script)
    status, stdout, stderr = run(call)
    (name,) = {name for name, _ in told}
    assert (status, stdout) == (3, f"{name}\nkept\n".encode()), stderr
    all_gone()
    assert [event for _, event in told].count("domain-shutdown") == 1


def test_default_target_is_redirected_to_one(app, work, run, all_gone):
    app.policy.add_rule(f"{SHELL} * work @default allow target=@dispvm")
    assert run(communicate(work, f"qrexec-client-vm @default {SHELL}"))[0] == 0
    all_gone()


def test_calls_at_once_have_one_each(app, work, run, all_gone):
    app.policy.add_rule(f"{SHELL} * work @dispvm allow")

    async def calls():
        command = f"qrexec-client-vm @dispvm {SHELL}"
        names = (communicate(work, command, b"hostname\n") for _ in range(3))
        return await asyncio.gather(*names)

    results = run(calls())
    assert [status for status, *_ in results] == [0, 0, 0]
    assert len({stdout for _, stdout, _ in results}) == 3
    all_gone(3)


def test_much_data_both_ways(app, work, run, all_gone):
    app.policy.add_rule("qubes.VMExec * work @dispvm allow")
    data = bytes(range(256)) * 4096 * 4
    command = "qrexec-client-vm @dispvm qubes.VMExec+cat"
    status, stdout, stderr = run(communicate(work, command, data))
    assert status == 0, stderr
    assert stdout == data
    all_gone()


@pytest.mark.guest_panics
def test_one_that_does_not_start_is_126(app, base, work, run, all_gone):
    app.policy.add_rule(f"{SHELL} * work @dispvm allow")
    base.kernelopts = "rdinit=/nowhere init=/nowhere"
    base.qrexec_timeout = 300
    saved, app.warm_starts = app.warm_starts, None
    try:
        call = communicate(work, f"qrexec-client-vm @dispvm {SHELL}")
        status, stdout, stderr = run(call)
    finally:
        app.warm_starts = saved
    assert (status, stdout) == (126, b"")
    assert b"panic" not in stderr, "what other VMs print is not the caller's business"
    all_gone()


def test_without_a_default_it_is_126(app, work, run):
    app.policy.add_rule(f"{SHELL} * work @dispvm allow")
    app.default_dispvm = None
    assert run(communicate(work, f"qrexec-client-vm @dispvm {SHELL}"))[0] == 126
    assert not any(vm.klass == "DispVM" for vm in app.domains)


@pytest.mark.parametrize("moment", ["made", "starting", "called"])
@pytest.mark.parametrize("how", ["kill", "client"])
def test_it_goes_when_its_caller_dies(  # noqa: PLR0917
    app, work, run, all_gone, told, moment, how
):
    """At any moment: while it is made, while it starts, while it serves."""
    app.policy.add_rule(f"{SHELL} * work @dispvm allow")
    event = {
        "made": "domain-create-on-disk",
        "starting": "domain-pre-start",
        "called": "domain-start",
    }[moment]

    async def call_and_die():
        # its input does not end: the service would wait for ever
        process = await work.run(f"qrexec-client-vm @dispvm {SHELL}", stdin=-1)
        async with asyncio.timeout(BOUND):
            while event not in [event for _, event in told]:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        if how == "kill":
            await work.kill()
        else:
            process.kill()
        with contextlib.suppress(ConnectionError):
            await process.wait()

    run(call_and_die())
    all_gone()


def test_it_goes_when_it_powers_off_in_a_call(app, work, run, all_gone):
    app.policy.add_rule("qubes.VMRootShell * work @dispvm allow")
    command = "qrexec-client-vm @dispvm qubes.VMRootShell"
    script = b"poweroff; sleep 9000\n"
    assert run(communicate(work, command, script))[0] == 255
    all_gone()


@pytest.mark.parametrize("end", ["inside", "kill", "shutdown", "cleanup"])
@pytest.mark.usefixtures("kept")
def test_by_hand(base, run, sh, all_gone, end):
    vm = run(DispVM.from_appvm(base))
    run(vm.start())
    assert sh(vm, "cat /home/user/kept; qubesdb-read /qubes-vm-persistence") == (
        "kept\nnone"
    )
    sh(vm, "echo changed > /home/user/kept; echo changed > /etc/kept")
    if end == "inside":
        run(vm.run("poweroff", user="root"))
    elif end == "shutdown":
        run(vm.shutdown(wait=True))
    else:
        run(getattr(vm, end)())
    all_gone()
    run(base.start())
    assert sh(base, "cat /home/user/kept; test ! -e /etc/kept") == "kept"


def test_start_that_fails_by_hand(app, base, run, all_gone):
    vm = run(DispVM.from_appvm(base))
    vm.kernel = None
    with pytest.raises(exc.QubesVMStartError, match="find its kernel"):
        run(vm.start())
    all_gone()
    assert vm not in app.domains


def test_calls_start_no_more_vms_than_there_is_memory_for(  # noqa: PLR0917
    app, work, run, all_gone, monkeypatch, caplog
):
    """A rule that lets a guest have any number of them does not bring the host down."""
    hypervisor = app.hypervisor
    taken = sum(domain.spec.memory for domain in hypervisor.domains())
    monkeypatch.setattr(hypervisor, "memory_limit", taken + app.default_dispvm.memory)
    app.policy.add_rule("* * work @dispvm allow")
    # the one that has the memory goes on until the others have been told
    call = "{ qrexec-client-vm @dispvm qubes.VMShell </tmp/in; echo $? >>/tmp/told; }"
    script = f"""
        cd /tmp; mkfifo in; touch told; exec 3<>in
        for i in 1 2 3 4 5 6; do {call} 3>&- & done
        until [ $(wc -l <told) -ge 5 ]; do sleep 0.1; done
        exec 3>&-; wait; cat told
    """
    output, _ = run(work.run_for_stdio(script))
    assert sorted(output.split()) == [b"0", *[b"126"] * 5]
    messages = [r.getMessage() for r in caplog.records if "could not" in r.getMessage()]
    assert len(messages) == 5
    assert all("work holds 400 MiB" in text for text in messages)
    all_gone(6)
