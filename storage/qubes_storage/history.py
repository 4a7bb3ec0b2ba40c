"""The committed image of a volume, and the former ones: its revisions.

A committed image is never written again.  So a revision is made by a hard link, and a
commit by a rename, in this order; what a crash leaves in between can be told, and the
next commit takes it up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qubes_storage import files

if TYPE_CHECKING:
    from pathlib import Path

    from qubes_storage.layout import Revision, VolumeFiles

__all__ = ["History"]


class History:
    """Commits and reverts; blocking, and to be called under the volume's lock.

    :param volume_files: where the files of the volume are.
    """

    def __init__(self, volume_files: VolumeFiles) -> None:
        self._files = volume_files

    def revisions(self) -> list[Revision]:
        """Return the revisions, oldest first."""
        revisions = self._files.revisions()
        return revisions[:-1] if self._is_interrupted(revisions) else revisions

    def commit(self, image: Path, keep: int) -> None:
        """Make `image`, under a name of its own so far, the committed one.

        :param keep: how many revisions are left afterwards, the present one included.
        :raise OSError: the present image is still the committed one then.
        """
        files.fsync(image)
        self._begin(keep)
        files.rename(image, self._files.clean)
        self._prune(keep)

    def revert(self, revision: Revision, keep: int) -> None:
        """Make a revision the committed image.

        :param keep: as for `commit`.
        :raise OSError: the present image is still the committed one then.
        """
        image = self._files.revision(revision)
        if files.same_image(image, self._files.clean):
            return
        self._begin(keep)
        files.replace_with_link(image, self._files.clean)
        self._prune(keep)

    def _begin(self, keep: int) -> None:
        # A clone of the present image must not survive it as that of the next one.
        files.remove(self._files.precache)
        if keep < 1 or files.stat_image(self._files.clean) is None:
            return
        if not self._is_interrupted(self._files.revisions()):
            target = self._files.revision(self._files.next_revision())
            files.link(self._files.clean, target)

    def _is_interrupted(self, revisions: list[Revision]) -> bool:
        # The latest revision is the committed image itself only if a crash came
        # between the link and the rename.
        if not revisions:
            return False
        latest = self._files.revision(revisions[-1])
        return files.same_image(latest, self._files.clean)

    def _prune(self, keep: int) -> None:
        revisions = self.revisions()
        surplus = len(revisions) - max(0, keep)
        for revision in revisions[: max(0, surplus)]:
            files.remove(self._files.revision(revision))
