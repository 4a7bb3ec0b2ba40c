"""An environment of Python for the plugins of apps, over the one that we run in."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import signal
import site
import subprocess
import sys
import tomllib
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qubes_itests.apps.exc import InstallError
from qubes_itests.host.cache import Cache, digest
from qubes_itests.host.tree import tree_digest
from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Environment", "install"]

_KIND: Final = "app"
_GROUP: Final = "qubes.tests.extra"
_TIMEOUT: Final = 300.0
_TAIL: Final = 3000
#: A project is built where it is, for it may read what lies beside it; what that
#: writes goes to memory, and is gone with the namespace. $1 is for the memory, $2 the
#: project.
_IN_TREE: Final = """\
mount -t tmpfs -o mode=700 none "$1"
mkdir "$1/new" "$1/work"
cd "$2"
mount -t overlay -o "lowerdir=.,upperdir=$1/new,workdir=$1/work" overlay "$2"
cd "$2"
shift 2
exec "$@"
"""


@dataclass(frozen=True, slots=True)
class Environment:
    """Where the plugin of one app is installed.

    :param app: the app's directory.
    :param packages: the directory with its packages, for the path of imports.
    :param entries: names of its entry points of tests.
    """

    app: Path
    packages: Path
    entries: tuple[str, ...]


def install(
    cache: Cache, app: Path, projects: Sequence[Path], say: Callable[[str], None]
) -> Environment:
    """Install the test plugin of an app beside ours, where nobody else sees it.

    Blocking; seconds when something of the app has changed. Its directory stays as it
    is. What it needs and we do not have comes from the package index.

    :param app: its directory.
    :param projects: of it; see `find_projects`.
    :param say: is told what is going on.
    :raise InstallError: pip fails, with what it says, or there are no tests.
    """
    if not projects:
        raise InstallError(
            str(app),
            "no setup.py, setup.cfg or pyproject.toml in it, or two levels below,"
            f" names the entry point group {_GROUP}",
        )
    key = digest(sys.version, sys.prefix, tree_digest(app), Path(__file__))

    def build(place: Path) -> None:
        say("installing its tests")
        _make(place, app, projects)

    packages = _packages(cache.entry(_KIND, key, build))
    entries = _entries(packages)
    if not entries:
        raise InstallError(str(app), f"it has no entry point in the group {_GROUP}")
    return Environment(app, packages, entries)


def _packages(place: Path) -> Path:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return place / "lib" / version / "site-packages"


def _make(place: Path, app: Path, projects: Sequence[Path]) -> None:
    venv.create(place, clear=True, with_pip=False)
    # what is installed beside us is there already, for pip and for the plugin
    ours = "".join(f"import site; site.addsitedir({p!r})\n" for p in _our_packages())
    (_packages(place) / "beside.pth").write_text(ours)
    scratch = place / "scratch"
    scratch.mkdir()
    for project in projects:
        _pip(place / "bin/python", app, project, scratch)
    scratch.rmdir()


def _our_packages() -> list[str]:
    return [path for path in site.getsitepackages() if Path(path).is_dir()]


def _pip(python: Path, app: Path, project: Path, scratch: Path) -> None:
    pip: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "--no-input",
    ]
    quiet = ["--disable-pip-version-check", "--progress-bar=off"]
    if not _names_its_builder(project):
        # ours is at hand, and takes no network
        quiet.append("--no-build-isolation")
    unshared = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--"]
    command: list[str | Path] = [
        *unshared,
        *("sh", "-ec", _IN_TREE, "sh", str(scratch), str(project)),
        *(*pip, "install", *quiet, "--no-warn-script-location", project),
    ]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PIP_ROOT_USER_ACTION": "ignore", "PYTHONPATH": ""},
        process_group=0,
    ) as process:
        try:
            output, _ = process.communicate(timeout=_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise InstallError(
                str(app), f"pip did not end within {_TIMEOUT:g} s"
            ) from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        said = _plain(output[-_TAIL:].decode(errors="replace"))
        said = safe_text(said, lines=True, limit=None)
        raise InstallError(str(app), f"pip cannot install {project}", said)


def _names_its_builder(project: Path) -> bool:
    try:
        return "build-system" in tomllib.loads((project / "pyproject.toml").read_text())
    except (OSError, ValueError):
        return False


def _plain(said: str) -> str:
    """Return what pip said without the frames and colours around it."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", said)
    lines = (line.strip("│╰╭─ ").rstrip() for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def _entries(packages: Path) -> tuple[str, ...]:
    names = {
        entry.name: None
        for found in importlib.metadata.distributions(path=[str(packages)])
        for entry in found.entry_points
        if entry.group in (_GROUP, f"{_GROUP}.for_template")
    }
    return tuple(names)
