"""Making a VM with its volumes: whole, or not at all."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from qubes_itests.core.store.saving import save
from qubes_itests.core.vm.qubesvm import QubesVM
from qubes_storage.uninterrupted import to_its_end

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from qubes_itests.core.vm.base import BaseVM

__all__ = ["making"]


@contextlib.asynccontextmanager
async def making(vm: BaseVM) -> AsyncIterator[None]:
    """Have a new VM made while the context lasts, and the app saved with it at the end.

    If either fails or is cancelled, the volumes that were made are removed again, and
    the VM is none any more.  Nothing else is removed: it is known what was made.

    Until the context ends the VM is in no store, and nothing may rely on it.

    :param vm: from `Qubes.add_new_vm`, without an await in between; its volumes are
        made in the context, by its `create_on_disk` or `clone_disk_files`.
    """
    app = vm.app
    may_be_stored = False
    try:
        with vm.being("made"):
            yield
        may_be_stored = True
        if app.journal is not None:
            app.journal.settle(vm.uuid)
        await save(app)
    except BaseException:
        with vm.being("made"):
            await to_its_end(_undo(vm, may_be_stored=may_be_stored))
        raise


async def _undo(vm: BaseVM, *, may_be_stored: bool) -> None:
    if isinstance(vm, QubesVM):
        # a save that failed may have replaced the store all the same
        await vm.storage.undo(keep_note=may_be_stored)
        vm.storage.unbind()
    vm.app.domains.withdraw(vm)
