"""Which releases of Debian there are templates of, and what packages they have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["PACKAGES", "RELEASES", "Release"]

#: Besides the essential packages and apt, with what they depend on.
PACKAGES: Final = (
    "dbus-user-session",
    "e2fsprogs",
    "iproute2",
    "libnss-myhostname",
    "libpam-systemd",
    "procps",
    "python3",
    "sudo",
    "systemd-sysv",
)


@dataclass(frozen=True, slots=True)
class Release:
    """One release.

    :param name: of its template, as in "debian-12".
    :param suite: its code name in the archive.
    """

    name: str
    suite: str


RELEASES: Final = {
    release.name: release
    for release in (Release("debian-12", "bookworm"), Release("debian-13", "trixie"))
}
