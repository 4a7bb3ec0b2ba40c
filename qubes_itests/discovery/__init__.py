"""The search for installed test plugins, and for the tests that they list.

A plugin is an entry point in one of two groups; see :data:`GROUP` and
:data:`GROUP_FOR_TEMPLATE`.  Whatever is wrong with one becomes a :class:`Problem` of
that plugin, never an error of the search.
"""

from __future__ import annotations

from .result import GROUP, GROUP_FOR_TEMPLATE, Plugin, Problem, TestClass
from .search import discover
from .selection import Selection

__all__ = [
    "GROUP",
    "GROUP_FOR_TEMPLATE",
    "Plugin",
    "Problem",
    "Selection",
    "TestClass",
    "discover",
]
