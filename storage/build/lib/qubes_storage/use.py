"""What a process knows of a volume's use that the volume's files do not tell."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qubes_storage.exc import VolumeIOError, VolumeStateError

if TYPE_CHECKING:
    from qubes_storage.claims import Claims

__all__ = ["VolumeUse"]


class VolumeUse:
    """Whether a volume is started, importing, exporting; known across processes.

    :param pool: name of the pool, for the errors.
    :param vid: id of the volume.
    :param claims: the claims of the pool.
    """

    def __init__(self, pool: str, vid: str, claims: Claims) -> None:
        self.pool = pool
        self.vid = vid
        self.started = False
        self.import_size: int | None = None
        self._claims = claims
        self._exported = f"{vid} exported"
        self._in_use = f"{vid} in use"
        self._exports = 0
        self._loss: str | None = None

    def begin(self, action: str) -> None:
        """Claim the volume for this process, to start it or to import into it.

        :raise VolumeStateError: when another process has it started, or imports.
        """
        if not self._claims.is_held(self._in_use) and not self._claims.take(
            self._in_use
        ):
            self._refuse_other(action)

    def end(self) -> None:
        """Undo `begin`: it is not started any more, and no import is under way."""
        self.started = False
        self.import_size = None
        self._loss = None
        self._claims.drop(self._in_use)

    def begin_export(self) -> None:
        """Note a reader of the committed image."""
        self._claims.take(self._exported, shared=True)
        self._exports += 1

    def end_export(self) -> None:
        """Note that a reader is done; no error when there is none."""
        if self._exports:
            self._exports -= 1
            self._claims.drop(self._exported)

    def is_exported(self) -> bool:
        """Tell whether anybody reads the committed image, in whatever process."""
        return bool(self._exports) or self._claims.is_elsewhere(self._exported)

    def lose(self, reason: str) -> None:
        """Note that what a VM wrote may not have reached the disk."""
        self.started = False
        self._loss = reason

    def refuse_if_lost(self, action: str) -> None:
        """Raise when what a VM wrote may be lost: a second fsync would not tell.

        :raise VolumeIOError: until it is started again, or removed.
        """
        if self._loss is not None:
            reason = (
                f"what its VM wrote may be lost ({self._loss}); start it again to go on"
                " with what is there, or remove it"
            )
            raise VolumeIOError(self.pool, self.vid, action, reason)

    def go_on(self) -> None:
        """Note that the volume is started."""
        self.started = True
        self._loss = None

    def refuse_if_started(self, action: str) -> None:
        """Raise when this process has started the volume."""
        if self.started:
            self._refuse(action, "it is started already; stop it first")

    def refuse_if_importing(self, action: str) -> None:
        """Raise when this process imports into the volume."""
        if self.import_size is not None:
            self._refuse(action, "an import is under way")

    def is_used(self) -> bool:
        """Tell whether it is started, or being imported into, in whatever process."""
        held = self._claims.is_held(self._in_use)
        return held or self._claims.is_elsewhere(self._in_use)

    def refuse_if_used_elsewhere(self, action: str) -> None:
        """Raise when another process has it started, or imports into it."""
        if not self._claims.is_held(self._in_use) and self.is_used():
            self._refuse_other(action)

    def _refuse_other(self, action: str) -> None:
        self._refuse(action, "another process has it started, or imports into it")

    def _refuse(self, action: str, reason: str) -> None:
        raise VolumeStateError(self.pool, self.vid, action, reason)
