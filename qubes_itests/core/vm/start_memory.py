"""The memory that the start of a VM asks for, and whom it asks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

__all__ = ["MemorySource", "memory_for_start"]

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
