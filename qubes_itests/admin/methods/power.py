"""Methods on the life of VMs: start, shut down, pause, and how they are."""

from __future__ import annotations

from qubes_itests.admin.dispatch import Call, Destination, method
from qubes_itests.admin.usage import usage_of
from qubes_itests.admin.validation import words_among
from qubes_itests.core.exc import QubesVMNotRunningError
from qubes_itests.core.vm.adminvm import AdminVM
from qubes_itests.core.vm.qubesvm import QubesVM
from qubes_itests.core.vm.remotevm import RemoteVM

__all__: list[str] = []


def _acting(call: Call) -> QubesVM | AdminVM | RemoteVM:
    """Return the destination; dom0 and VMs of other machines refuse by themselves."""
    vm = call.destination
    assert isinstance(vm, QubesVM | AdminVM | RemoteVM)  # noqa: S101 - there are no others
    return vm


@method("admin.vm.Start")
async def start(call: Call) -> None:
    """Start it, and wait until it has started."""
    call.permit()
    await _acting(call).start()


@method("admin.vm.Shutdown", argument=words_among("force", "wait"))
async def shutdown(call: Call) -> None:
    """Ask its guest to power off; the argument is any of force and wait."""
    options = {word: word in call.argument for word in ("force", "wait")}
    call.permit(**options)
    await _acting(call).shutdown(**options)


@method("admin.vm.Kill")
async def kill(call: Call) -> None:
    """Stop it at once."""
    call.permit()
    await _acting(call).kill()


@method(
    *(f"admin.vm.{act}" for act in ("Pause", "Unpause", "Suspend", "Resume")),
    destination=Destination.VM,
)
async def pause(call: Call) -> None:
    """Stop its virtual CPUs, or have them run again."""
    call.permit()
    vm = call.destination
    assert isinstance(vm, QubesVM | RemoteVM)  # noqa: S101 - dom0 is no destination
    actions = {
        "Pause": vm.pause,
        "Unpause": vm.unpause,
        "Suspend": vm.suspend,
        "Resume": vm.resume,
    }
    await actions[call.method.rpartition(".")[2]]()


@method("admin.vm.CurrentState")
async def current_state(call: Call) -> str:
    """Return its memory in KiB, its CPU time in milliseconds, and its power state."""
    call.permit()
    vm = call.destination
    usage = await usage_of(vm)
    most = max(vm.memory, vm.maxmem or 0) if isinstance(vm, QubesVM) else 0
    state = {
        "mem": usage.memory >> 10,
        "mem_static_max": most << 10,
        "cputime": round(usage.cpu_time * 1000),
        "power_state": vm.get_power_state(),
    }
    return " ".join(f"{key}={value}" for key, value in state.items())


@method("admin.vm.Console", destination=Destination.VM)
async def console(call: Call) -> str:
    """Return the path of the file that collects what the guest prints."""
    call.permit()
    vm = call.destination
    if not isinstance(vm, QubesVM) or not vm.is_running() or vm.domain is None:
        raise QubesVMNotRunningError(vm)
    return str(vm.domain.console_log())
