"""Makes ``import qubes…`` work for test plugins where no Qubes OS is installed.

:func:`install` adds a finder behind all others, so a real ``qubes`` package wins.  What
the finder offers is one table, :data:`.table.ALIASES`; the classes are those of
qubes_itests itself, the very same objects.
"""

from __future__ import annotations

from .finder import install, uninstall

__all__ = ["install", "uninstall"]
