"""Stand-ins for the modules of Qubes OS, for plugins where it is not installed.

:func:`install` adds a finder behind all others, so a real ``qubes`` package wins.  What
the finder offers is one table, :data:`.table.ALIASES`; the classes are those of
qubes_itests itself, the very same objects.
"""

from __future__ import annotations

from .finder import install, uninstall

__all__ = ["install", "uninstall"]
