"""This machine's way to Debian's archive: its package sources and options."""

from __future__ import annotations

import platform
import re
from typing import Final

from qubes_itests.host.command import run
from qubes_itests.host.exc import CommandError, MissingToolError

__all__ = ["acquire_options", "debian_sources"]

#: What of apt's options says how to get at files, and nothing else.
_ACQUIRE: Final = re.compile(
    r"^Acquire::(?:https?(?:::[\w:.-]+)?|Retries|Check-Date|Check-Valid-Until)"
    r' "[^"]+";$',
    re.MULTILINE | re.IGNORECASE,
)
_FORMAT: Final = "$(REPO_URI) $(RELEASE) $(COMPONENT)"
#: Mirrors keep the archives under these names; others' packages are none of ours.
_ARCHIVE: Final = re.compile(r"/debian(?:-security)?/*")


def debian_sources(suite: str) -> list[str]:
    """Return the lines of a sources.list for a suite, from this machine's mirrors.

    :param suite: a code name of Debian, as in "bookworm".
    :return: empty where this machine uses no archive of Debian: on other
        distributions, say.
    """
    own = _codename()
    lines: dict[str, None] = {}
    for line in _targets() if own else ():
        uri, _, rest = line.partition(" ")
        release, _, component = rest.partition(" ")
        name, _, branch = release.partition("-")
        if name == own and component == "main" and _ARCHIVE.search(uri):
            dash = "-" if branch else ""
            lines[f"deb {uri} {suite}{dash}{branch} main"] = None
    return list(lines)


def acquire_options() -> str:
    """Return the apt.conf of a proxy and the like, as this machine has them."""
    try:
        dump = run(["apt-config", "dump"])
    except (CommandError, MissingToolError):
        return ""
    return "".join(f"{line}\n" for line in _ACQUIRE.findall(dump))


def _targets() -> list[str]:
    command = ["apt-get", "indextargets", "--no-release-info", "--format", _FORMAT]
    try:
        return run([*command, "Created-By: Packages"]).splitlines()
    except (CommandError, MissingToolError):
        return []


def _codename() -> str | None:
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return None
    return release.get("VERSION_CODENAME") if release.get("ID") == "debian" else None
