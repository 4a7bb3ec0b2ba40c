"""The VMs of an app, found by name, number, UUID or themselves."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from qubes_itests.core import config
from qubes_itests.core.exc import QubesException, QubesValueError, QubesVMNotFoundError
from qubes_itests.core.vm.base import BaseVM

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qubes_itests.core.app import Qubes

__all__ = ["VMCollection"]


class VMCollection:
    """The VMs of an app: a mapping by name (or `qid`, UUID, VM), iterated over VMs.

    :param app: events ``domain-add``, ``domain-pre-delete`` and ``domain-delete`` are
        fired on it.
    """

    def __init__(self, app: Qubes) -> None:
        self._app = app
        self._by_uuid: dict[uuid.UUID, BaseVM] = {}

    def add(self, vm: BaseVM) -> BaseVM:
        """Add a VM, and return it.

        :raise QubesValueError: when its name or number is taken.
        """
        for known in self:
            if vm.name == known.name:
                raise QubesValueError(f"there is a VM {vm.name!r} already")
            if vm.qid == known.qid:
                raise QubesValueError(f"there is a VM with qid {vm.qid} already")
        self._by_uuid[vm.uuid] = vm
        vm.events_enabled = True
        vm.fire_event("domain-init")
        self._app.fire_event("domain-add", vm=vm)
        return vm

    def _find(self, key: Any) -> BaseVM | None:
        if isinstance(key, BaseVM):
            found = self._by_uuid.get(key.uuid)
            return found if found is key else None
        if isinstance(key, uuid.UUID):
            return self._by_uuid.get(key)
        return next(
            (vm for vm in self._by_uuid.values() if key in (vm.name, vm.qid)), None
        )

    def __getitem__(self, key: Any) -> Any:
        # a wrapper of a VM stands for the VM
        key = getattr(key, "_vm", key)
        found = self._find(key)
        if found is None:
            raise QubesVMNotFoundError(key)
        return found

    def __contains__(self, key: object) -> bool:
        return self._find(getattr(key, "_vm", key)) is not None

    def get(self, key: Any, default: Any = None) -> Any:
        """Return the VM, or `default` when there is none."""
        found = self._find(getattr(key, "_vm", key))
        return default if found is None else found

    def __delitem__(self, key: Any) -> None:
        vm = self[key]
        if vm.klass == "AdminVM":
            raise QubesException("dom0 cannot be removed")
        if not vm.is_halted():
            raise QubesException(f"VM {vm} runs; kill or shut it down before removing")
        vm.check_unused()
        self._app.fire_event("domain-pre-delete", pre_event=True, vm=vm)
        del self._by_uuid[vm.uuid]
        vm.events_enabled = False
        self._app.fire_event("domain-delete", vm=vm)

    def __iter__(self) -> Iterator[Any]:
        return iter(list(self._by_uuid.values()))

    def __len__(self) -> int:
        return len(self._by_uuid)

    def keys(self) -> list[str]:
        """Return the names."""
        return [vm.name for vm in self]

    def values(self) -> list[Any]:
        """Return the VMs."""
        return list(self)

    def items(self) -> list[tuple[str, Any]]:
        """Return names and VMs."""
        return [(vm.name, vm) for vm in self]

    def get_new_unused_qid(self) -> int:
        """Return the lowest number that no VM has; LookupError when all are taken."""
        taken = {vm.qid for vm in self}
        for qid in range(1, config.max_qid + 1):
            if qid not in taken:
                return qid
        raise LookupError(f"all {config.max_qid} numbers of VMs are taken")
