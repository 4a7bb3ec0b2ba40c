"""The packages of a release, unpacked and configured by mmdebstrap, as a tar file."""

from __future__ import annotations

import contextlib
import re
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qubes_itests.exc import DeadlineError
from qubes_itests.guest.exc import NotFetchedError
from qubes_itests.guest.image.debian.release import PACKAGES
from qubes_itests.host.apt import acquire_options, debian_sources
from qubes_itests.host.cache import Cache, digest
from qubes_itests.host.command import started, tool_environment
from qubes_itests.host.confined import PLACE, confined
from qubes_itests.host.exc import MissingToolError, NoNetworkError
from qubes_itests.host.packages import find_program
from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from qubes_itests.guest.image.debian.release import Release

__all__ = ["base_key", "fetch_base", "find_base"]

_KIND: Final = "debian-base"
_TIMEOUT: Final = 900.0
_LOOK: Final = 0.5
_TAIL: Final = 12
_STAGE: Final = re.compile(r"^I: ([^\n]{1,200})$", re.MULTILINE)


def find_base(cache: Cache, release: Release) -> Path:
    """Return the tar file of a release that was fetched before.

    :raise NotFetchedError: it was not.
    """
    place = cache.lookup(_KIND, base_key(release))
    if place is None:
        raise NotFetchedError(release.name)
    return place / "root.tar"


def fetch_base(
    cache: Cache,
    release: Release,
    say: Callable[[str], None],
    *,
    timeout: float = _TIMEOUT,
) -> Path:
    """Return the tar file of a release, made of the archive's packages on first use.

    Blocking, for a minute or two then. What mmdebstrap says is kept beside it, in a
    file ``log``. A network is needed: in a sandbox there is none.

    :param say: is told now and then what is going on, as a short phrase.
    :param timeout: seconds for everything.
    :raise MissingToolError: mmdebstrap is not installed.
    :raise NoNetworkError: it failed; says how.
    :raise DeadlineError: it took too long.
    """

    def build(place: Path) -> None:
        _Build(place, release, say, time.monotonic() + timeout, timeout).run()

    return cache.entry(_KIND, base_key(release), build) / "root.tar"


def base_key(release: Release) -> str:
    """Return what the tar file is kept under: it depends on the packages' names."""
    return digest(release.suite, *PACKAGES, Path(__file__))


class _Build:
    """One run of mmdebstrap."""

    def __init__(
        self,
        place: Path,
        release: Release,
        say: Callable[[str], None],
        end: float,
        timeout: float,
    ) -> None:
        self._place = place
        self._release = release
        self._say = say
        self._end = end
        self._timeout = timeout
        self._log = place / "log"

    def run(self) -> None:
        sources = debian_sources(self._release.suite)
        scratch = self._place / "scratch"
        scratch.mkdir()
        (scratch / "apt.conf").write_text(acquire_options())
        (scratch / "sources").write_text("".join(f"{line}\n" for line in sources))
        command = self._command(sources, scratch)
        with (
            (scratch / "sources").open("rb") as stdin,
            self._log.open("wb") as log,
            started(
                command,
                stdin=stdin,
                stdout=log,
                stderr=log,
                environment={
                    **tool_environment(),
                    "TMPDIR": str(PLACE / scratch.name),
                },
            ) as process,
        ):
            while process.poll() is None:
                self._wait(process)
        if process.returncode:
            raise NoNetworkError(f"The template {self._release.name}", self._words())
        for path in scratch.iterdir():
            path.unlink()
        scratch.rmdir()

    def _command(self, sources: list[str], scratch: Path) -> list[str | Path]:
        program = find_program("mmdebstrap")
        if program is None:
            raise MissingToolError(
                "mmdebstrap",
                "Install it with: apt-get install --no-install-recommends mmdebstrap",
            )
        options = ("--mode=root", "--variant=apt", "--format=tar", "--verbose")
        arguments: list[str | Path] = [
            program,
            *options,
            f"--aptopt={PLACE / scratch.name / 'apt.conf'}",
            f"--include={','.join(PACKAGES)}",
            # documentation in languages and manuals are of no use to a test
            "--dpkgopt=path-exclude=/usr/share/man/*",
            "--dpkgopt=path-exclude=/usr/share/locale/*",
            "--dpkgopt=path-exclude=/usr/share/doc/*",
            "--dpkgopt=path-include=/usr/share/doc/*/copyright",
            *_keyring(),
            self._release.suite,
            PLACE / "root.tar",
            # without its own sources it knows where Debian is
            *(["-"] if sources else []),
        ]
        return confined(self._place, arguments)

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        left = self._end - time.monotonic()
        if left <= 0:
            what = f"template {self._release.name}"
            raise DeadlineError(what, self._timeout, self._words())
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(min(_LOOK, left))
        stages = _STAGE.findall(self._said())
        self._say(stages[-1] if stages else "starting mmdebstrap")

    def _said(self) -> str:
        return safe_text(self._log.read_bytes().strip(), lines=True, limit=None)

    def _words(self) -> str:
        lines = self._said().splitlines()
        problems = [line for line in lines if line.startswith(("E:", "W:"))]
        return "\n".join((problems or lines)[-_TAIL:]) or "mmdebstrap was silent"


def _keyring() -> list[str]:
    path = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
    return [f"--keyring={path}"] if path.is_file() else []
