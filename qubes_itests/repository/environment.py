"""Test plugins of apps: found in a repository, and installed beside our own Python."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import site
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qubes_itests.exc import DeadlineError, HarnessError
from qubes_itests.host.cache import Cache, digest
from qubes_itests.host.command import CommandError, run
from qubes_itests.host.confined import PLACE, confined
from qubes_itests.host.pip_settings import pip_settings
from qubes_itests.host.tree import files_of, tree_digest
from qubes_itests.untrusted_text import quoted, safe_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from qubes_itests.repository.requirements import Requirements

__all__ = [
    "Environment",
    "InstallError",
    "Project",
    "find_projects",
    "install",
    "make_environment",
    "packages_of",
]

_KIND: Final = "app"
_GROUP: Final = "qubes.tests.extra"
_FILES: Final = ("setup.py", "setup.cfg", "pyproject.toml")
#: Directories below the app's own: tests/, tests/integration/.
_DEPTH: Final = 2
#: Names of the distributions that are there for the tests, and are not theirs.
_REQUIRED: Final = "required"
_TIMEOUT: Final = 300.0
#: A project is built where it is, for it may read what lies beside it; what that
#: writes goes to memory, and is gone with the namespace. $1 is the directory where
#: that happens, $2 the project, $3 what stands in for its setup.py. An overlay cannot
#: lie over two others, as one in a container does, and some kernels have none: then a
#: copy takes the project's place. The user's settings of distutils are covered, for
#: they say where packages go.
_IN_TREE: Final = """\
mkdir "$1/memory" "$1/tmp"
mount -t tmpfs -o mode=700 none "$1/memory"
mkdir "$1/memory/new" "$1/memory/work"
cd "$2"
layers="lowerdir=.,upperdir=$1/memory/new,workdir=$1/memory/work"
mount -t overlay -o "$layers" overlay "$2" 2>/dev/null || {
    mkdir "$1/copy"
    cp -a . "$1/copy"
    mount --bind "$1/copy" "$2"
}
cd "$2"
[ -z "$3" ] || cp -- "$3" setup.py
if [ -e "$HOME/.pydistutils.cfg" ]; then
    mount --bind /dev/null "$HOME/.pydistutils.cfg"
fi
shift 3
exec "$@" >&2
"""


class InstallError(HarnessError):
    """A checkout could not be installed: the plugin of an app, or a core.

    :param app: the app's directory.
    :param reason: how it failed.
    :param output: the end of what pip said.
    """

    def __init__(self, app: str, reason: str, output: str = "") -> None:
        # The first line alone is shown where there is room for no more.
        said = f"\n{quoted(output)}" if output else ""
        super().__init__(f"{app} cannot be installed: {reason}{said}")


@dataclass(frozen=True, slots=True)
class Project:
    """What pip installs.

    :param directory: of the project.
    :param script: name of the file that stands in for its setup.py; empty for none.
    """

    directory: Path
    script: str = ""


def find_projects(directory: Path, named: Sequence[str] = ()) -> list[Project]:
    """Return what pip installs of an app's test plugins, the app's own first.

    A project is one whose setup.py, setup.cfg or pyproject.toml names an entry point
    group of test plugins. Below a project no other is looked for.

    :param directory: the app's.
    :param named: projects in it that the app names itself, if it does: folders, or
        files in place of setup.py. Then no others are looked for.
    :raise InstallError: when there is nothing of such a name.
    """
    if named:
        return [_named(directory, name) for name in dict.fromkeys(named)]
    return [Project(found) for found in _found(directory)]


def _named(directory: Path, name: str) -> Project:
    path = directory / name
    inside = path.resolve().is_relative_to(directory.resolve())
    if not inside or not (path.is_file() or path.is_dir()):
        raise InstallError(
            str(directory), f"plugin: there is no file or folder {name!r} in it"
        )
    if path.is_dir():
        return Project(path)
    return Project(path.parent, "" if path.name == "setup.py" else path.name)


def _found(directory: Path) -> list[Path]:
    found: dict[Path, None] = {}
    for name in sorted(files_of(directory), key=lambda path: (len(path.parts), path)):
        below = name.parent
        if name.name not in _FILES or len(below.parts) > _DEPTH:
            continue
        if any(directory / parent in found for parent in below.parents):
            continue
        file = directory / name
        # others may have a folder of that name, or a link that leads nowhere
        if file.is_file() and _GROUP.encode() in file.read_bytes():
            found[directory / below] = None
    return list(found)


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
    cache: Cache,
    app: Path,
    projects: Sequence[Project],
    say: Callable[[str], None],
    requires: Requirements,
) -> Environment:
    """Install the test plugin of an app into an environment that no other app sees.

    Blocking; seconds when something of the app has changed. Its directory stays as it
    is. What it needs and we do not have comes from the package index.

    :param app: its directory.
    :param projects: of it; see `find_projects`.
    :param say: called with what is going on, a phrase.
    :param requires: what its tests need besides.
    :raise InstallError: pip fails, with what it says, or there are no tests.
    """
    if not projects:
        raise InstallError(
            str(app),
            "no setup.py, setup.cfg or pyproject.toml in it, or two levels below,"
            f" names the entry point group {_GROUP}",
        )
    if os.pathsep in str(cache.root):
        raise InstallError(
            str(app),
            f"the cache {cache.root} has a {os.pathsep} in its name, and PYTHONPATH"
            " cannot name what is in it; name another in QUBES_ITESTS_CACHE",
        )
    if missing := requires.missing_packages():
        names = " ".join(missing)
        raise InstallError(
            str(app),
            f"they need packages of Debian that are not installed here: {names}."
            f" Install them: apt-get install {names}",
        )
    # Relative: a checkout elsewhere, as each job of a CI system has, is the same app.
    scripts = [
        os.path.relpath(project.directory / project.script, app) for project in projects
    ]
    key = digest(
        *(sys.version, sys.prefix, tree_digest(app), Path(__file__)),
        *("\n".join(scripts), "\n".join(requires.packages)),
        *(tree_digest(project) for project in requires.projects),
    )

    def build(place: Path) -> None:
        say("installing its tests")
        make_environment(place, app, projects, requires)

    place = cache.entry(_KIND, key, build)
    packages = packages_of(place)
    required = (place / _REQUIRED).read_text().split()
    entries = _entries(packages, required)
    if not entries:
        raise InstallError(str(app), f"it has no entry point in the group {_GROUP}")
    return Environment(app, packages, entries)


def packages_of(place: Path) -> Path:
    """Return the directory with the packages of an environment."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return place / "lib" / version / "site-packages"


def make_environment(
    place: Path,
    app: Path,
    projects: Sequence[Project],
    requires: Requirements,
    variables: Sequence[str] = (),
) -> None:
    """Make an environment with projects of a repository and what they need. Blocking.

    :param place: an empty directory.
    :param app: the repository, for errors.
    :param variables: of the environment in which projects are built: NAME=VALUE.
    :raise InstallError: pip fails; with what it says.
    """
    # by a program that knows it by another name: one with a colon in it is refused
    venv = (sys.executable, "-I", "-m", "venv", "--without-pip", str(PLACE))
    run(confined(place, venv), timeout=_TIMEOUT)
    # what is installed beside us is there already, for pip and for the plugin
    beside = [path for path in site.getsitepackages() if Path(path).is_dir()]
    ours = "".join(f"import site; site.addsitedir({p!r})\n" for p in beside)
    (packages_of(place) / "beside.pth").write_text(ours)
    if requires.packages:
        _pip(place, app, None, requires.packages)
    for project in map(Project, requires.projects):
        _pip(place, app, project)
    # their tests are not the app's
    found = importlib.metadata.distributions(path=[str(packages_of(place))])
    (place / _REQUIRED).write_text("\n".join(each.name for each in found))
    for project in projects:
        _pip(place, app, project, variables=variables)


def _pip(
    place: Path,
    app: Path,
    project: Project | None,
    packages: Sequence[str] = (),
    variables: Sequence[str] = (),
) -> None:
    """Install a project, or else packages of the index."""
    scratch = place / "scratch"
    (scratch / "empty").mkdir(parents=True)
    # a name of which the project is not hidden
    shown = PLACE
    if project is not None and project.directory.resolve().is_relative_to(PLACE.parent):
        shown = Path("/mnt") / PLACE.name
    quiet = ["--disable-pip-version-check", "--progress-bar=off", "--no-input"]
    what, wanted = f"{' '.join(packages)}, which its tests require", list(packages)
    directory, script = str(shown / scratch.name / "empty"), ""
    if project is not None:
        what = directory = str(project.directory)
        wanted, script = [directory], project.script
        if not _names_its_builder(project.directory):
            # ours is at hand, and takes no network
            quiet.append("--no-build-isolation")
    pip = (sys.executable, "-P", "-m", "pip", "--python", str(shown / "bin/python"))
    command: list[str | Path] = [
        *("sh", "-ec", _IN_TREE, "sh", str(shown / scratch.name), directory, script),
        *("env", *_pip_environment(app, shown / scratch.name / "tmp")),
        *variables,
        *(*pip, "install", *quiet, "--no-warn-script-location", "--", *wanted),
    ]
    try:
        run(confined(place, command, shown), timeout=_TIMEOUT)
    except CommandError as error:
        reason = f"pip cannot install {what}"
        raise InstallError(str(app), reason, _plain(error.stderr)) from None
    except DeadlineError:
        reason = f"pip did not end within {_TIMEOUT:g} s"
        raise InstallError(str(app), reason) from None
    shutil.rmtree(scratch)


def _pip_environment(app: Path, temporary: Path) -> list[str]:
    try:
        settings = pip_settings(sys.executable)
    except subprocess.CalledProcessError as error:
        raise InstallError(str(app), "pip's settings", _plain(error.stderr)) from None
    more = {"PIP_ROOT_USER_ACTION": "ignore", "TMPDIR": str(temporary)}
    return [f"{name}={value}" for name, value in {**settings, **more}.items()]


def _names_its_builder(project: Path) -> bool:
    try:
        return "build-system" in tomllib.loads((project / "pyproject.toml").read_text())
    except (OSError, ValueError, RecursionError):
        return False  # pip says what is wrong with it


def _plain(said: str) -> str:
    """Return what pip said as mere text, without the frames and colours around it."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", said)
    lines = (line.strip("│╰╭─ ").rstrip() for line in text.splitlines())
    text = "\n".join(line for line in lines if line)
    return safe_text(text, lines=True, limit=None)


def _entries(packages: Path, required: Sequence[str]) -> tuple[str, ...]:
    names = {
        entry.name: None
        for found in importlib.metadata.distributions(path=[str(packages)])
        for entry in found.entry_points
        if entry.group in (_GROUP, f"{_GROUP}.for_template")
        if found.name not in required
    }
    return tuple(names)
