"""Sizes of memory: their units, as people write and read them."""

from __future__ import annotations

__all__ = ["KIB", "MIB", "mib"]

KIB = 1024
MIB = 1024 * KIB


def mib(size: int) -> str:
    """Return a size in bytes as text in MiB."""
    return f"{size / MIB:.0f} MiB"
