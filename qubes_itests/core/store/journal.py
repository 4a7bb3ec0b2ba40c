"""The journal: VMs that are being made or removed, noted beside the store.

To make or remove a VM takes many files and one line in the store, and a process may end
in between.  So before the first volume is made, or removed, a note of all of them is
brought to the disk; it goes when a store that agrees with them has been saved.  An app
that finds a note when it is loaded knows what to undo, or to finish: see `recover`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import threading
import uuid as uuid_module
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

from qubes_itests.core.exc import QubesException, QubesVMError
from qubes_itests.core.store.file import StoreError, fsync_directory, write_durably
from qubes_storage.uninterrupted import to_its_end

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from qubes_itests.core.app import Qubes
    from qubes_itests.core.vm.base import BaseVM
    from qubes_storage.volume import Volume

__all__ = ["MAKE", "REMOVE", "Journal", "Note", "note", "recover"]

log = logging.getLogger("qubes.store")

MAKE: Final = "make"
REMOVE: Final = "remove"

_SUFFIX: Final = ".json"


@dataclass(frozen=True, slots=True)
class Note:
    """That a VM is being made, or removed.

    :param action: `MAKE` or `REMOVE`.
    :param uuid: the VM's.
    :param name: the VM's, for people.
    :param volumes: pool and id of each volume that is made, or removed; those to be
        made were not there before.
    """

    action: str
    uuid: uuid_module.UUID
    name: str
    volumes: tuple[tuple[str, str], ...]

    def encode(self) -> bytes:
        """Return what a file holds of it."""
        fields = {
            "action": self.action,
            "uuid": str(self.uuid),
            "name": self.name,
            "volumes": self.volumes,
        }
        return json.dumps(fields, indent=1).encode() + b"\n"

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read what `encode` has written; ValueError for anything else."""
        fields: Any = json.loads(data)
        try:
            volumes = tuple((str(pool), str(vid)) for pool, vid in fields["volumes"])
            uuid = uuid_module.UUID(fields["uuid"])
            note = cls(fields["action"], uuid, str(fields["name"]), volumes)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"expected a note of the journal: {error!r}") from error
        if note.action not in {MAKE, REMOVE}:
            raise ValueError(f"expected {MAKE} or {REMOVE}, got {note.action!r}")
        return note


class Journal:
    """The notes beside one store; what touches the disk blocks.

    :param store: the file of the store; the notes are in a folder of its name with
        ``.journal`` appended.
    """

    def __init__(self, store: Path) -> None:
        self.directory = store.with_name(f"{store.name}.journal")
        # Notes are written and dropped in threads, and settled on the event loop.
        self._mutex = threading.Lock()
        self._open: dict[Path, Note] = {}
        self._settled: set[Path] = set()

    def begin(self, action: str, vm: BaseVM, volumes: Iterable[Volume]) -> None:
        """Note what is about to be done; when this returns it survives a power cut.

        :param action: `MAKE` or `REMOVE`.
        :param vm: to which VM.
        :param volumes: with which of its volumes.
        :raise OSError: when the note cannot be written; there is none then.
        """
        wanted = tuple((volume.pool.name, volume.vid) for volume in volumes)
        note = Note(action, vm.uuid, vm.name, wanted)
        if not self.directory.is_dir():
            self.directory.mkdir(mode=0o700, exist_ok=True)
            fsync_directory(self.directory.parent)
        # A name is never used again: the thread of a save may be about to drop an old
        # note of the same VM, and must not take this one for it.
        path = self.directory / f"{vm.uuid}-{secrets.token_hex(4)}{_SUFFIX}"
        new = path.with_suffix(".new")
        try:
            write_durably(new, note.encode())
            new.rename(path)
            fsync_directory(self.directory)
        except BaseException:
            for left in (new, path):
                with contextlib.suppress(OSError):
                    left.unlink()
            raise
        with self._mutex:
            self._open[path] = note

    def settle(self, uuid: uuid_module.UUID) -> None:
        """Say that all that is noted of a VM is done: the next save drops the notes."""
        with self._mutex:
            self._settled |= self._of(uuid)

    def settled(self) -> frozenset[Path]:
        """Return the notes that a store, of the state of now, makes superfluous."""
        with self._mutex:
            return frozenset(self._settled)

    def discard(self, uuid: uuid_module.UUID) -> None:
        """Drop all notes of a VM: there is nothing of it on the disk."""
        with self._mutex:
            paths = self._of(uuid)
        self.drop(paths)

    def drop(self, paths: Iterable[Path]) -> None:
        """Drop notes."""
        for path in paths:
            # A note that stays is found at the next start, and nothing is left to do.
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            with self._mutex:
                self._open.pop(path, None)
                self._settled.discard(path)

    def read(self) -> dict[Path, Note]:
        """Return the notes that a former process has left, by their files.

        :raise StoreError: for one that cannot be read; only its user may drop it.
        """
        found = {}
        for path in sorted(self.directory.glob(f"*{_SUFFIX}")):
            try:
                found[path] = Note.decode(path.read_bytes())
            except (OSError, ValueError) as error:
                raise StoreError(
                    path,
                    f"{path} should say which VM was being made or removed, and cannot"
                    f" be read: {error}; move it away, and look for volumes without a"
                    " VM",
                ) from error
        for path in self.directory.glob("*.new"):
            # `begin` did not return, so that nothing was made or removed yet.
            path.unlink(missing_ok=True)
        with self._mutex:
            self._open |= found
        return found

    def _of(self, uuid: uuid_module.UUID) -> set[Path]:
        return {path for path, note in self._open.items() if note.uuid == uuid}


async def note(action: str, vm: BaseVM, volumes: Iterable[Volume]) -> None:
    """Note in the journal of a VM's app, if it has one, what is about to be done.

    :param action: `MAKE` or `REMOVE`.
    :param vm: to which VM.
    :param volumes: with which of its volumes.
    :raise QubesVMError: when the note cannot be written; there is none then, as when
        this is cancelled.
    """
    journal = vm.app.journal
    if journal is None:
        return
    try:
        # A thread cannot be cancelled.  Left to itself it would write the note after
        # our caller has given up, and the next start would remove volumes for it.
        await to_its_end(asyncio.to_thread(journal.begin, action, vm, volumes))
    except asyncio.CancelledError:
        journal.discard(vm.uuid)
        raise
    except OSError as error:
        raise QubesVMError(
            vm,
            f"VM {vm} cannot be {action}d: no note of that can be written in"
            f" {journal.directory}: {error.strerror}",
        ) from error


async def recover(app: Qubes) -> None:
    """Finish or undo what the notes in the journal of a newly loaded app say.

    A VM whose making was noted, and is in the store with all its volumes, is whole.
    Any other is as if it had never been: its volumes go.  A removal that was noted is
    finished.  Nothing goes but what a note names, and never what a VM of the store has.
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
        # Only a save drops notes; a crash before it repeats all this without harm.
        await app.save_async()


async def _settle(app: Qubes, note: Note) -> None:
    noted = [vm for vm in app.domains.startable() if vm.uuid == note.uuid]
    for vm in noted:
        if note.action == MAKE and await vm.storage.is_whole():
            return
        vm.check_unused()
        vm.storage.unbind()
        app.domains.withdraw(vm)
    what = "making of" if note.action == MAKE else "removal of"
    log.warning("the %s VM %s was interrupted: its volumes go", what, note.name)
    for pool, vid in note.volumes:
        # The note is old if another VM has the volume by now.
        if (pool, vid) not in app.pools.owned_volumes():
            await app.pools.remove_unowned(app.get_pool(pool), vid)
