"""Sizes of memory: their units, as people write and read them."""

from __future__ import annotations

import re

__all__ = ["KIB", "MIB", "mib", "parse_size"]

KIB = 1024
MIB = 1024 * KIB

_UNITS = {
    "": 1,
    "B": 1,
    "K": KIB,
    "KIB": KIB,
    "KB": 1000,
    "M": MIB,
    "MIB": MIB,
    "MB": 1000**2,
    "G": 1024 * MIB,
    "GIB": 1024 * MIB,
    "GB": 1000**3,
}
_SIZE = re.compile(r"([0-9]{1,15})\s*([A-Za-z]*)", re.ASCII)


def mib(size: int) -> str:
    """Return a size in bytes as text in MiB."""
    return f"{size / MIB:.0f} MiB"


def parse_size(text: str) -> int:
    """Return the bytes that a text like ``200MiB`` means.

    :param text: a whole number and a unit: KiB, MiB, GiB (K, M, G are the same),
        KB, MB, GB (powers of ten), B or none for bytes.
    :raise ValueError: for anything else.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"{text!r} is no size: write a whole number and MiB or GiB")
    return int(match[1]) * _UNITS[match[2].upper()]
