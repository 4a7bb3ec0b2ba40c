"""An HVM without a kernel boots what is on its root volume."""

import logging

import pytest
from conditions import wait_until

from qubes_itests.core import exc

#: Writes what follows it to the serial port, and halts.
CODE = bytes.fromhex("31c0 8ed8 fc baf803 be167c ac 84c0 7403 ee ebf8 f4 ebfd")
SECTOR = (CODE + b"booted from the disk\r\n\0").ljust(510, b"\0") + b"\x55\xaa"


@pytest.fixture
def vm(make_vm, run):
    vm = make_vm("alone", "StandaloneVM", virt_mode="hvm", kernel=None, memory=200)
    vm.shutdown_timeout = 1
    root = vm.volumes["root"]

    async def fill():
        path = await root.import_data(1 << 20)
        path.write_bytes(SECTOR.ljust(1 << 20, b"\0"))
        await root.import_data_end(True)

    run(fill())
    return vm


def test_it_boots_runs_no_commands_and_is_killed(vm, run):
    run(vm.start())
    console = vm.directory / "console.log"
    wait_until(lambda: b"booted from the disk" in console.read_bytes(), "its sector")
    assert vm.get_power_state() == "Running"
    with pytest.raises(exc.QubesVMError, match="no agent, as it has no kernel"):
        run(vm.run_for_stdio("true"))
    run(vm.pause())
    run(vm.unpause())
    run(vm.storage.resize("root", 2 << 20))
    with pytest.raises(exc.QubesVMShutdownTimeoutError):
        # it does not look at the button
        run(vm.shutdown(wait=True))
    assert vm.is_running()
    run(vm.kill())
    assert vm.is_halted()
    run(vm.start())
    run(vm.kill())


def test_it_has_no_network_and_says_so(vm, make_vm, run, caplog):
    vm.netvm = make_vm("net", provides_network=True)
    with caplog.at_level(logging.WARNING):
        run(vm.start())
    assert "alone starts without a network, which an agent sets up" in caplog.text
    with pytest.raises(exc.QubesVMError, match="no agent"):
        run(vm.attach_network())
    run(vm.kill())


def test_pvh_needs_a_kernel(vm, run):
    vm.virt_mode = "pvh"
    with pytest.raises(exc.QubesVMError, match="virt_mode to hvm, which boots from"):
        run(vm.start())
