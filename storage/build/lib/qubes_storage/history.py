"""The committed image of a volume, and the former ones: its revisions.

A committed image is never written again.  So a revision is made by a hard link, and a
commit by a rename, in this order; what a crash leaves in between can be told, and the
next commit takes it up.
"""

from __future__ import annotations

import contextlib
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
        """Make `image`, which is on the disk under another name, the committed one.

        :param keep: how many revisions are left afterwards, the present one included.
        :raise OSError: the present image is still the committed one then.
        """
        self._keep_present(keep)
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
        self._keep_present(keep)
        files.replace_with_link(image, self._files.clean)
        self._prune(keep)

    def _keep_present(self, keep: int) -> None:
        # A clone of the present image must not survive it as that of the next one.
        files.give_up(self._files.precache)
        clean = self._files.clean
        if files.stat_image(clean) is None:
            return
        if keep < 1:
            # The rename over its last name would remove it there and then.
            files.link(clean, files.given_up_name(clean))
        elif not self._is_interrupted(self._files.revisions()):
            files.link(clean, self._files.revision(self._files.next_revision()))

    def _is_interrupted(self, revisions: list[Revision]) -> bool:
        # The latest revision is the committed image itself only if a crash came
        # between the link and the rename.
        if not revisions:
            return False
        latest = self._files.revision(revisions[-1])
        return files.same_image(latest, self._files.clean)

    def _prune(self, keep: int) -> None:
        # All is committed: a surplus revision is no reason to say it failed.
        with contextlib.suppress(OSError):
            revisions = self.revisions()
            surplus = len(revisions) - max(0, keep)
            for revision in revisions[: max(0, surplus)]:
                files.give_up(self._files.revision(revision))
