"""Packages for a layer: fetched by this machine's apt as the template's apt would."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qubes_itests.guest.exc import ImageError
from qubes_itests.guest.image.layer.root_files import read_image_file, release_of
from qubes_itests.host.apt import acquire_options
from qubes_itests.host.cache import Cache, digest
from qubes_itests.host.command import CommandError, run
from qubes_itests.host.confined import PLACE, confined

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["fetch_packages", "image_key"]

_KIND: Final = "packages"
_TIMEOUT: Final = 600.0
_KEYRING: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


def image_key(cache: Cache, image: Path) -> str:
    """Return what tells an image from others, without reading all of it."""
    if image.is_relative_to(cache.root):
        return str(image.relative_to(cache.root))  # by its contents, as all there
    status = image.stat()
    return f"{image} {status.st_size} {status.st_mtime_ns}"


def fetch_packages(
    cache: Cache,
    template: str,
    base: Path,
    names: tuple[str, ...],
    say: Callable[[str], None],
) -> Path:
    """Return a directory with the archives that packages take over a root image.

    Blocking, for some seconds on first use; a network is needed then. Recommended
    packages are left out.

    :param template: its name, for errors.
    :param base: the root image, of Debian.
    :param names: of packages, checked.
    :param say: is told what is going on.
    :raise ImageError: the image is not of Debian, a package does not exist, or the
        archive cannot be reached; with what apt says.
    """
    key = digest(image_key(cache, base), *names, Path(__file__))

    def build(place: Path) -> None:
        with tempfile.TemporaryDirectory(dir=place, prefix=".") as scratch:
            fetch = _Fetch(template, base, Path(scratch), say)
            fetch.prepare()
            fetch.download(names, place)

    return cache.entry(_KIND, key, build)


class _Fetch:
    """One use of apt, with its own lists, state and options."""

    def __init__(
        self, template: str, base: Path, scratch: Path, say: Callable[[str], None]
    ) -> None:
        self._template = template
        self._base = base
        self._scratch = scratch
        self._say = say
        self._archives = scratch / "cache" / "archives"

    def prepare(self) -> None:
        status = read_image_file(self._base, "/var/lib/dpkg/status")
        sources = read_image_file(self._base, "/etc/apt/sources.list")
        if status is None or not sources:
            release = release_of(self._base).get("PRETTY_NAME", "of an unknown kind")
            raise self._error(f"its base is {release}, which has no packages of apt")
        for name in ("state/lists/partial", "cache/archives/partial"):
            (self._scratch / name).mkdir(parents=True)
        (self._scratch / "status").write_text(status)
        (self._scratch / "sources.list").write_text(_signed(sources))
        (self._scratch / "apt.conf").write_text(acquire_options() + self._options())

    def download(self, names: tuple[str, ...], place: Path) -> None:
        self._say("reading the lists of packages")
        self._apt("update", "-o", "APT::Update::Error-Mode=any")
        self._say(f"fetching {', '.join(names)}")
        self._apt("install", "--download-only", *names)
        for archive in sorted(self._archives.glob("*.deb")):
            shutil.move(archive, place / archive.name)

    def _options(self) -> str:
        here = PLACE
        values = {
            "Dir::State": here / "state",
            "Dir::State::status": here / "status",
            "Dir::Cache": here / "cache",
            "Dir::Log": here,
            "Dir::Etc::sourcelist": here / "sources.list",
            **{
                f"Dir::Etc::{name}": "/dev/null"
                for name in (
                    *("main", "parts", "sourceparts", "preferences"),
                    *("preferencesparts", "netrc", "netrcparts"),
                )
            },
            # the directories are root's own, which apt's user cannot write
            "APT::Sandbox::User": "root",
            "APT::Install-Recommends": "false",
            "Acquire::Languages": "none",
            "Acquire::Retries": "2",
        }
        return "".join(f'{name} "{value}";\n' for name, value in values.items())

    def _error(self, reason: str) -> ImageError:
        return ImageError(
            f"template {self._template}", f"its packages could not be fetched: {reason}"
        )

    def _apt(self, *words: str) -> None:
        environment = f"APT_CONFIG={PLACE / 'apt.conf'}"
        command = ["env", environment, "apt-get", "-q", "-y", *words]
        try:
            run(confined(self._scratch, command), timeout=_TIMEOUT)
        except CommandError as error:
            raise self._error(error.stderr) from error


def _signed(sources: str) -> str:
    """Return sources with Debian's keys, which other distributions do not trust."""
    if not _KEYRING.is_file():
        return sources
    lines = (
        line.replace("deb ", f"deb [signed-by={_KEYRING}] ", 1)
        if line.startswith("deb ") and "[" not in line
        else line
        for line in sources.splitlines()
    )
    return "".join(f"{line}\n" for line in lines)
