"""Entry points as tests want them to be."""

from __future__ import annotations

import contextlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["substitute_entry_points"]


@contextlib.contextmanager
def substitute_entry_points(group: str, tempgroup: str) -> Iterator[None]:
    """Have who asks for the entry points of a group get those of another, for a block.

    :param group: what is asked for.
    :param tempgroup: whose entry points are found.
    """
    from unittest import mock  # noqa: PLC0415 - `list` has no need of it

    real = importlib.metadata.entry_points

    def entry_points(**selection: Any) -> object:
        if selection.get("group") == group:
            selection["group"] = tempgroup
        return real(**selection)

    with mock.patch("importlib.metadata.entry_points", entry_points):
        yield
