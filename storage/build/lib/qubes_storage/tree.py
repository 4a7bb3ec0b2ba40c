"""Finding the volumes, and what is left of interrupted operations, in a pool's tree."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qubes_storage.exc import InvalidVidError
from qubes_storage.layout import check_vid, parse_name

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["FoundVolume", "find_volumes"]


@dataclass(frozen=True, slots=True)
class FoundVolume:
    """A volume that has files.

    :param vid: its id.
    :param has_image: whether it has an image, and not only leftovers.
    :param has_leftovers: whether something of it is left to be removed.
    """

    vid: str
    has_image: bool
    has_leftovers: bool


def find_volumes(directory: Path) -> Iterator[FoundVolume]:
    """Yield the volumes that have files in a pool's directory.

    :raise OSError: when a directory cannot be read.
    """
    for prefix in _directories(directory):
        for vm in _directories(prefix.path):
            yield from _volumes(f"{prefix.name}/{vm.name}", vm.path)


def _directories(path: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    with os.scandir(path) as entries:
        return [entry for entry in entries if entry.is_dir()]


def _volumes(vm: str, path: str) -> Iterator[FoundVolume]:
    images: set[str] = set()
    left: set[str] = set()
    for name in os.listdir(path):  # noqa: PTH208 - 10,000 of them, for their names
        if parsed := parse_name(name):
            if parsed.is_image:
                images.add(parsed.volume)
            if parsed.is_left:
                left.add(parsed.volume)
    for volume in sorted(images | left):
        vid = f"{vm}/{volume}"
        if _is_vid(vid):
            yield FoundVolume(vid, volume in images, volume in left)


def _is_vid(vid: str) -> bool:
    try:
        check_vid(vid)
    except InvalidVidError:
        return False
    return True
