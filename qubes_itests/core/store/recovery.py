"""What a process that ended in the middle of it has left: finished, or undone.

A VM whose making was noted, and is in the store with all its volumes, is whole.  Any
other is as if it had never been: its volumes go.  A removal that was noted is finished.
Nothing goes but what a note names, and never what a VM of the store has.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from qubes_itests.core.exc import QubesException
from qubes_itests.core.store.journal import MAKE

if TYPE_CHECKING:
    from qubes_itests.core.app import Qubes
    from qubes_itests.core.store.journal import Note

__all__ = ["recover"]

log = logging.getLogger("qubes.store")


async def recover(app: Qubes) -> None:
    """Deal with the notes in the journal of an app that has just been loaded.

    What cannot be done now is noted in `problems`, and tried again at the next start.

    :raise StoreError: when a note cannot be read, or the app cannot be saved.
    """
    if app.journal is None:
        return
    notes = await asyncio.to_thread(app.journal.read)
    for note in notes.values():
        try:
            await _settle(app, note)
        except QubesException as error:
            log.error("VM %s is neither whole nor gone: %s", note.name, str(error))  # noqa: TRY400
            app.problems.append(f"VM {note.name} is neither whole nor gone: {error}")
        else:
            app.journal.settle(note.uuid)
    if notes:
        await app.save_async()


async def _settle(app: Qubes, note: Note) -> None:
    vm = app.domains.get(note.uuid)
    if vm is not None:
        if note.action == MAKE and await vm.storage.is_whole():
            return
        vm.check_unused()
        vm.storage.unbind()
        app.domains.withdraw(vm)
    what = "making of" if note.action == MAKE else "removal of"
    log.warning("the %s VM %s was interrupted: its volumes go", what, note.name)
    for pool, vid in note.volumes:
        # the note is old if another VM has the volume by now
        if (pool, vid) not in app.owned_volumes():
            await app.remove_unowned(app.get_pool(pool), vid)
