"""What a volume ought to hold, as simply as it can be said."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

BASE = 64 * 1024

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Image:
    """A committed image: never written again, so it is told by its number.

    Its content is one byte, in several places.
    """

    content: int
    size: int
    number: int = field(default_factory=lambda: next(_numbers))


@dataclass
class VolumeModel:
    """What one volume ought to hold."""

    kind: str
    keep: int = 0
    source: str | None = None
    configured: int = BASE
    committed: Image | None = None
    #: What a VM writes: content and size; it may outlive the process.
    dirty: list[int] | None = None
    revisions: list[Image] = field(default_factory=list)
    started: bool = False
    #: Size of the import that is under way.
    importing: int | None = None
    #: What a started snapshot was started from.
    origin: Image | None = None

    @property
    def keeps_image(self) -> bool:
        return self.kind in {"saved", "both", "read_only"}

    @property
    def saves(self) -> bool:
        return self.kind in {"saved", "both"}

    @property
    def is_snapshot(self) -> bool:
        return self.kind in {"snapshot", "both"}

    @property
    def is_dirty(self) -> bool:
        return self.saves and self.dirty is not None

    @property
    def is_idle(self) -> bool:
        return not (self.started or self.is_dirty or self.importing)

    @property
    def size(self) -> int:
        if self.dirty is not None:
            return self.dirty[1]
        if self.keeps_image and self.committed:
            return self.committed.size
        return self.configured

    def commit(self, image: Image, *, former: Image | None) -> None:
        """Take `image`; `former` becomes a revision, if that is wanted."""
        if self.keep > 0 and former is not None:
            self.revisions.append(former)
        self.revisions = self.revisions[-self.keep :] if self.keep > 0 else []
        self.committed = image

    def forget_process(self) -> None:
        """Lose what no file tells."""
        self.configured = self.size
        self.started = False
        self.importing = None
        if not self.is_dirty:
            self.dirty = self.origin = None

    def forget(self) -> None:
        """Be removed."""
        self.committed = self.dirty = self.origin = None
        self.started, self.importing, self.revisions = False, None, []
