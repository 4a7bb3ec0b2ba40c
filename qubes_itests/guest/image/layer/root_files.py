"""Files of a root image, read without mounting it."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING, Final

from qubes_itests.guest.exc import ImageError
from qubes_itests.host.command import CommandError, run

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["read_image_file", "release_of", "services_of"]

#: As `debugfs` lists a file: /INODE/MODE/UID/GID/NAME/SIZE/, the mode in octal.
_PROGRAM: Final = re.compile(r"^/\d+/10\d+[1357]/\d+/\d+/([^/]+)/\d+/$", re.MULTILINE)
_FIELD: Final = re.compile(r"^([A-Z_]+)=(.*)$", re.MULTILINE)


def read_image_file(image: Path, path: str) -> str | None:
    """Return a file of an ext4 image, None if there is none. Blocking.

    :param image: nothing writes to it meanwhile.
    :param path: absolute, of plain letters: it is not for names that a guest chose.
    :raise ImageError: the image cannot be read.
    """
    try:
        status = run(["debugfs", "-R", f"stat {path}", image])
        if "Type: regular" not in status:
            return None
        return run(["debugfs", "-R", f"cat {path}", image])
    except CommandError as error:
        raise ImageError(f"layer over {image.name}", error.stderr) from error


def services_of(image: Path) -> list[str]:
    """Return the names of the programs in an image's /etc/qubes-rpc. Blocking.

    :param image: nothing writes to it meanwhile.
    :raise ImageError: the image cannot be read.
    """
    try:
        listed = run(["debugfs", "-R", "ls -p /etc/qubes-rpc", image])
    except CommandError as error:
        raise ImageError(image.name, error.stderr) from error
    return sorted({name.partition("+")[0] for name in _PROGRAM.findall(listed)})


def release_of(image: Path) -> dict[str, str]:
    """Return the fields of an image's os-release; empty if it has none."""
    text = read_image_file(image, "/usr/lib/os-release")
    fields = _FIELD.findall(text or read_image_file(image, "/etc/os-release") or "")
    return {name: "".join(shlex.split(value)) for name, value in fields}
