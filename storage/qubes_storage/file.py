"""Driver ``file``: plain sparse files, copied at each start."""

from __future__ import annotations

from qubes_storage.image_pool import ImagePool

__all__ = ["FilePool"]


class FilePool(ImagePool):
    """A directory on any filesystem; the same tree as that of ``file-reflink``.

    Everything works as it does there, except that no extents are shared: a start copies
    the data of the image, and no copy is ever prepared.
    """

    driver = "file"
    lacks = frozenset({"shared_extents"})
