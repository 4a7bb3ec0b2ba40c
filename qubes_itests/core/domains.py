"""The VMs of an app, found by name, number, UUID or themselves."""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections import deque
from typing import TYPE_CHECKING, Final, TypeVar

from qubes_itests.core import config
from qubes_itests.core.exc import (
    QubesException,
    QubesVMAlreadyExistsError,
    QubesVMError,
    QubesVMNotFoundError,
    QubesVMNotHaltedError,
)
from qubes_itests.core.vm.adminvm import AdminVM
from qubes_itests.core.vm.base import DISPOSABLE, BaseVM
from qubes_itests.core.vm.dispvm import DispVM
from qubes_itests.core.vm.qubesvm import QubesVM
from qubes_storage.uninterrupted import to_its_end

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qubes_itests.core.app import Qubes

__all__ = ["VMCollection"]

_VM = TypeVar("_VM", bound=BaseVM)

#: Names of so many disposable VMs that are gone are not given again.
_REMEMBERED: Final = 1000


class VMCollection:
    """The VMs of an app: a mapping by name (or `qid`, UUID, VM), iterated over VMs.

    :param app: events ``domain-add``, ``domain-pre-delete`` and ``domain-delete`` are
        fired on it.
    """

    def __init__(self, app: Qubes) -> None:
        self._app = app
        self._by_uuid: dict[uuid.UUID, BaseVM] = {}
        self._by_name: dict[str, BaseVM] = {}
        self._by_qid: dict[int, BaseVM] = {}
        self._last_dispids: deque[int] = deque(maxlen=_REMEMBERED)
        self._removals: dict[uuid.UUID, asyncio.Future[None]] = {}
        #: No number below this one is free.
        self._next_qid = 1

    def add(self, vm: _VM, *, announce: bool = True) -> _VM:
        """Add a VM, and return it.

        :param announce: whether to enable its events and fire those of a new VM; a VM
            that is loaded is not new.
        :raise QubesVMAlreadyExistsError: when its name, number or UUID is taken.
        """
        self.check_free(vm)
        self._by_uuid[vm.uuid] = vm
        self._by_name[vm.name] = vm
        self._by_qid[vm.qid] = vm
        if announce:
            vm.events_enabled = True
            vm.fire_event("domain-init")
            self._app.fire_event("domain-add", vm=vm)
        return vm

    def check_free(self, vm: BaseVM) -> None:
        """Raise QubesVMAlreadyExistsError when its name, number or UUID is taken."""
        if vm.name in self._by_name:
            raise QubesVMAlreadyExistsError(f"there is a VM {vm.name!r} already")
        if vm.qid in self._by_qid:
            raise QubesVMAlreadyExistsError(f"there is a VM with qid {vm.qid} already")
        if vm.uuid in self._by_uuid:
            raise QubesVMAlreadyExistsError(
                f"there is a VM with UUID {vm.uuid} already"
            )

    def _find(self, key: object) -> BaseVM | None:
        if isinstance(key, BaseVM):
            found = self._by_uuid.get(key.uuid)
            return found if found is key else None
        if isinstance(key, str):
            return self._by_name.get(key)
        if isinstance(key, int):
            return self._by_qid.get(key)
        if isinstance(key, uuid.UUID):
            return self._by_uuid.get(key)
        # what stands for a VM, for synchronous code, is equal to it and has its name
        found = self._by_name.get(str(key))
        return found if found == key else None

    def __getitem__(self, key: object) -> BaseVM:
        found = self._find(key)
        if found is None:
            raise QubesVMNotFoundError(key)
        return found

    def __contains__(self, key: object) -> bool:
        return self._find(key) is not None

    def get(self, key: object, default: BaseVM | None = None) -> BaseVM | None:
        """Return the VM, or `default` when there is none."""
        found = self._find(key)
        return default if found is None else found

    def __delitem__(self, key: object) -> None:
        vm = self[key]
        self._begin_removal(vm)
        self.withdraw(vm)

    def _begin_removal(self, vm: BaseVM) -> None:
        if isinstance(vm, AdminVM):
            raise QubesException("dom0 cannot be removed")
        vm.check_whole()
        if not vm.is_halted() or vm.is_starting():
            raise QubesVMNotHaltedError(
                vm, f"VM {vm} runs; kill or shut it down before removing it"
            )
        vm.check_unused()
        self._app.fire_event("domain-pre-delete", pre_event=True, vm=vm)

    def withdraw(self, vm: BaseVM) -> None:
        """Take a VM out without asking anybody, and tell; its volumes stay."""
        del self._by_uuid[vm.uuid], self._by_name[vm.name], self._by_qid[vm.qid]
        self._next_qid = min(self._next_qid, vm.qid)
        self._app.fire_event("domain-delete", vm=vm)

    async def remove(self, key: object) -> None:
        """Remove the volumes of a VM, and then the VM; once begun it is finished.

        If a volume cannot be removed the VM stays.  A second call meanwhile waits for
        the same removal.

        :raise QubesVMNotHaltedError: when it runs.
        :raise QubesVMInUseError: when others use it, naming them.
        :raise StoragePoolException: when a volume cannot be removed.
        """
        vm = self[key]
        if vm.uuid not in self._removals:
            self._begin_removal(vm)
            vm.under_way = "removed"
            # A task, which a second caller can wait for, and which goes on when the
            # first is cancelled: half a VM would be of no use to anybody.
            self._removals[vm.uuid] = asyncio.ensure_future(self._remove(vm))
        await to_its_end(self._removals[vm.uuid])

    async def _remove(self, vm: BaseVM) -> None:
        # The VM goes after its volumes: until then no other can take its name, and find
        # its files.
        try:
            await vm.remove_from_disk()
            # Before handlers of the event below, one of which may fail: a note that
            # stays would have the next start remove volumes of these names.
            if self._app.journal is not None:
                self._app.journal.settle(vm.uuid)
            self.withdraw(vm)
        finally:
            vm.under_way = ""
            del self._removals[vm.uuid]

    def __iter__(self) -> Iterator[BaseVM]:
        return iter(list(self._by_uuid.values()))

    def __len__(self) -> int:
        return len(self._by_uuid)

    def startable(self) -> list[QubesVM]:
        """Return the VMs that can be started: neither dom0 nor those of elsewhere."""
        return [vm for vm in self._by_uuid.values() if isinstance(vm, QubesVM)]

    def startable_vm(self, key: object) -> QubesVM:
        """Return a VM that can be started.

        :raise QubesVMNotFoundError: when there is none.
        :raise QubesVMError: for dom0 and VMs of elsewhere.
        """
        vm = self[key]
        if not isinstance(vm, QubesVM):
            raise QubesVMError(vm, f"expected a VM with a guest, got {vm.klass} {vm}")
        return vm

    def disposables(self) -> list[DispVM]:
        """Return the disposable VMs."""
        return [vm for vm in self._by_uuid.values() if isinstance(vm, DispVM)]

    def keys(self) -> list[str]:
        """Return the names."""
        return [vm.name for vm in self]

    def values(self) -> list[BaseVM]:
        """Return the VMs."""
        return list(self)

    def items(self) -> list[tuple[str, BaseVM]]:
        """Return names and VMs."""
        return [(vm.name, vm) for vm in self]

    def get_new_unused_qid(self) -> int:
        """Return the lowest number that no VM has; LookupError when all are taken."""
        while self._next_qid in self._by_qid:
            self._next_qid += 1
        if self._next_qid > config.max_qid:
            raise LookupError(f"all {config.max_qid} numbers of VMs are taken")
        return self._next_qid

    def get_new_unused_dispid(self) -> int:
        """Return a number for the name of a new disposable VM, none of the last ones.

        :raise LookupError: when too many are taken.
        """
        free = set(range(1, config.max_dispid)).difference(
            (vm.disposable_number for vm in self.startable()),
            self._last_dispids,
            (
                int(n.removeprefix(config.dispvm_prefix))
                for n in self._by_name
                if DISPOSABLE.fullmatch(n)
            ),
        )
        if not free:
            raise LookupError(f"all numbers below {config.max_dispid} are taken")
        self._last_dispids.append(secrets.choice(tuple(free)))
        return self._last_dispids[-1]
