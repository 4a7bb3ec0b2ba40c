"""The memory that the start of a VM asks for, and whom it asks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from qubes_itests.core.vm.boot_data import (
    boot_files,
    domain_spec,
    identity,
    start_deadline,
)

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager, AsyncExitStack

    from qubes_itests.core.vm.qubesvm import QubesVM
    from qubes_itests.core.vm.step import Step

__all__ = ["MemorySource", "memory_for_start", "reserve_memory"]

_KIB: Final = 1 << 10
_MIB: Final = 1 << 20
_BASE_OVERHEAD: Final = 4 * _MIB
_VCPU_OVERHEAD: Final = 3 * _MIB // 2
#: Bytes of page tables per MiB of maximum memory, where the guest has its own.
_TABLES: Final = 8 * _KIB


class MemorySource(Protocol):
    """Who has the memory that starts need: qmemman, where it runs."""

    def memory(self, amount: int) -> AbstractAsyncContextManager[None]:
        """Have `amount` bytes free inside: start the VM there, and only then leave."""


def memory_for_start(
    memory: int, *, vcpus: int, maxmem: int = 0, virt_mode: str = "pvh"
) -> int:
    """Return what a VM's start asks for, in bytes.

    Its initial memory counts, not `maxmem`: what is populated on demand is the
    hypervisor's affair.

    :param memory: initial memory, MiB.
    :param vcpus: number of virtual CPUs.
    :param maxmem: what it may grow to, MiB; 0 when it is not balanced.
    :param virt_mode: ``pvh``, ``hvm`` or ``pv``.
    """
    overhead = _BASE_OVERHEAD + vcpus * _VCPU_OVERHEAD
    if virt_mode != "pv":
        overhead += max(memory, maxmem) * _TABLES
    return memory * _MIB + overhead


async def reserve_memory(
    vm: QubesVM, step: Step, reservation: AsyncExitStack, amount: int | None
) -> None:
    """Have the app's qmemman free the memory of a start until the stack closes.

    :param step: the start's.
    :param reservation: the stack.
    :param amount: bytes; None for what the VM's settings come to.
    """
    app = vm.app
    if app.qmemman is None:
        return
    if app.warm_starts is not None:
        # Making a saved state takes long, and while memory is reserved for this start
        # nobody else gets any: have it made before.
        with step("find its kernel"):
            files = boot_files(vm)
        if files is not None:
            with step("find a saved state"):
                spec = domain_spec(vm, app.directory, files)
                await app.warm_starts.state_for(spec, identity(vm), start_deadline(vm))
    with step("have its memory"):
        if amount is None:
            amount = memory_for_start(
                vm.memory, vcpus=vm.vcpus, maxmem=vm.maxmem, virt_mode=vm.virt_mode
            )
        await reservation.enter_async_context(app.qmemman.memory(amount))
