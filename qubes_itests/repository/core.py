"""A checkout of core-admin, installed into an environment of the cache."""

from __future__ import annotations

import ast
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qubes_itests.host.cache import digest
from qubes_itests.host.tree import IGNORED, files_of, tree_digest
from qubes_itests.repository.environment import (
    InstallError,
    Project,
    make_environment,
    packages_of,
)
from qubes_itests.repository.requirements import Requirements

if TYPE_CHECKING:
    from collections.abc import Callable

    from qubes_itests.host.cache import Cache

__all__ = ["CORE_TEMPLATES", "Core", "install_client", "install_core"]

#: Describes what templates have for its suites, as files of apps do.
CORE_TEMPLATES: Final = Path(__file__).with_name("core_templates.toml")

_KIND: Final = "core"
#: What a core needs; and the file with what that is, in the entry of the core.
_NEEDS: Final = "core-needs"
_PACKAGE: Final = "qubes"
#: What a checkout imports and the package index has; the metadata of a checkout name
#: nothing, since dom0 has it all from the packages of its distribution.
_DISTRIBUTIONS: Final = (
    ("docutils", "docutils"),
    ("jinja2", "jinja2"),
    ("lxml", "lxml"),
    # cores before 4.3 use it, and setuptools has it no more
    ("pkg_resources", "setuptools<81"),
    ("pyinotify", "pyinotify"),
    # which imports asyncore, and Python has that no more
    ("pyinotify", "pyasyncore; python_version >= '3.12'"),
    ("pyudev", "pyudev"),
    ("xdg", "pyxdg"),
    ("yaml", "pyyaml"),
)
_QREXEC: Final = "qrexec"
#: Where core-qrexec is if nobody says it: beside the checkout, as for its run-tests.
_QREXEC_NAMES: Final = ("core-qrexec", "qubes-core-qrexec")
#: The same for the client, if it is there: some tests call its programs.
_CLIENT_NAMES: Final = ("core-admin-client", "qubes-core-admin-client")
_CLIENT: Final = "qubesadmin"


@dataclass(frozen=True, slots=True)
class Core:
    """An installed checkout.

    :param checkout: the directory that it comes from.
    :param source: a copy of that, for the files that are in no package.
    :param packages: directories with its own metadata, and with what it needs.
    """

    checkout: Path
    source: Path
    packages: tuple[Path, ...]


def install_core(
    cache: Cache, checkout: Path, qrexec: Path | None, say: Callable[[str], None]
) -> Core:
    """Install a checkout of core-admin as it is, with what it needs.

    Blocking; what is in the cache takes a moment. The checkout stays as it is.

    :param checkout: its directory.
    :param qrexec: a checkout of core-qrexec; None for one beside the other.
    :param say: called with what is going on, a phrase.
    :raise InstallError: it is none, it has a syntax error, or pip fails.
    """
    if not (checkout / "setup.py").is_file() or not (checkout / _PACKAGE).is_dir():
        raise InstallError(
            str(checkout),
            f"expected a checkout of core-admin, with setup.py and the package"
            f" {_PACKAGE}: one of them is missing",
        )
    places = [checkout.parent / name for name in _QREXEC_NAMES]
    if qrexec is not None:
        places = [qrexec]
    projects = [place for place in places if place.is_dir()][:1]
    python = sys.version, sys.prefix, Path(__file__)
    key = digest(*python, tree_digest(checkout), *map(tree_digest, projects))

    def build(place: Path) -> None:
        say("installing it")
        imported = _imports(checkout, checkout / _PACKAGE)
        if _QREXEC in imported and not projects:
            raise InstallError(
                str(checkout),
                f"it imports {_QREXEC}, and there is no checkout of core-qrexec:"
                f" neither {' nor '.join(map(str, places))} is a directory; name one"
                " with --qrexec",
            )
        for project in projects:
            imported |= _imports(checkout, project / _QREXEC)
        # entry points for its own tests are among its metadata if the first is set
        variables = ("QUBES_TEST=1", "PIP_NO_DEPS=1")
        nothing = Requirements((), ())
        make_environment(place, checkout, [Project(checkout)], nothing, variables)
        (place / _NEEDS).write_text("\n".join(_distributions(imported)))
        # Tests look for files beside their package: templates, schemas, scripts.
        ignored = shutil.ignore_patterns(*IGNORED)
        shutil.copytree(checkout, place / "source", symlinks=True, ignore=ignored)

    def build_needs(place: Path) -> None:
        say("installing what it needs")
        requires = Requirements(tuple(words), tuple(projects))
        make_environment(place, checkout, [], requires)

    place = cache.entry(_KIND, key, build)
    words = (place / _NEEDS).read_text().splitlines()
    # by itself: it takes half of the time, and is the same after a change of the core
    key = digest(*python, *words, *map(tree_digest, projects))
    needs = packages_of(cache.entry(_NEEDS, key, build_needs))
    client = install_client(cache, checkout, say)
    packages = [packages_of(place), needs, *([client] if client else [])]
    return Core(checkout, place / "source", tuple(packages))


def install_client(
    cache: Cache, checkout: Path, say: Callable[[str], None]
) -> Path | None:
    """Install the client that lies beside a checkout of core-admin. Blocking.

    :return: the directory with its packages; None if there is no client.
    :raise InstallError: as for `install_core`.
    """
    places = [checkout.parent / name for name in _CLIENT_NAMES]
    client = next((place for place in places if (place / _CLIENT).is_dir()), None)
    if client is None:
        return None

    def build(place: Path) -> None:
        say("installing the client")
        requires = Requirements(_distributions(_imports(client, client / _CLIENT)), ())
        # it names packages that only a desktop has a use for
        make_environment(place, client, [Project(client)], requires, ("PIP_NO_DEPS=1",))

    key = digest(sys.version, sys.prefix, tree_digest(client), Path(__file__))
    return packages_of(cache.entry(_CLIENT, key, build))


def _distributions(imported: set[str]) -> tuple[str, ...]:
    return tuple(name for module, name in _DISTRIBUTIONS if module in imported)


def _imports(checkout: Path, package: Path) -> set[str]:
    """Return the top names of the modules that a package imports.

    :raise InstallError: there is none, or it has a syntax error.
    """
    if not package.is_dir():
        raise InstallError(str(checkout), f"there is no package {package}")
    found: set[str] = set()
    for name in files_of(package):
        if name.suffix != ".py":
            continue
        path = package / name
        try:
            tree = ast.parse(path.read_bytes(), os.fspath(path))
        except (SyntaxError, ValueError) as error:
            line = error.lineno if isinstance(error, SyntaxError) else None
            where = f"{path}:{line or 1}"
            raise InstallError(str(checkout), f"{where}: {error}") from None
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found
