"""A hook that points the client tools to a server, by this folder in PYTHONPATH.

Python imports a module of this name at its start.  It uses the standard library alone,
for the interpreter of the tools need not be the one that has qubes_itests.
"""

from __future__ import annotations

import contextlib
import functools
import getpass
import grp
import importlib.machinery
import importlib.util
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import ModuleType

_VARIABLE = "QUBES_ITESTS_SERVE"
_PACKAGE = "qubesadmin"
_LONGEST_PATH = 107
_GROUP = "qubes"
_DOM0 = "dom0"


def install(directory: str) -> None:
    """Have the client, once it is imported, call the server of a directory.

    :param directory: what ``QUBES_ITESTS_SERVE`` names.
    """
    sys.meta_path.insert(0, _Finder(directory))
    grp.getgrnam = _with_qubes(grp.getgrnam)  # type: ignore[assignment]


class _Finder(importlib.machinery.PathFinder):
    """Finds the package as Python does, and has it adjusted when it is loaded."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def find_spec(  # type: ignore[override]
        self,
        name: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the spec of the package; None for all others."""
        if name != _PACKAGE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            _adjust(module, self._directory)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _adjust(package: ModuleType, directory: str) -> None:
    config = package.config
    config.QUBESD_SOCKET = _connectable(f"{directory}/qubesd.sock")
    config.QREXEC_CLIENT = f"{directory}/bin/qrexec-client"
    config.QREXEC_SERVICES_DIR = f"{directory}/qubes-rpc"
    path = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = f"{directory}/dom0{os.pathsep}{path}"
    local = package.app.QubesLocal
    # elsewhere than in dom0 it would be the class that calls by qrexec
    vars(package)["Qubes"] = local
    if hasattr(local, "run_service"):
        local.run_service = _with_dom0(local.run_service)


def _connectable(path: str) -> str:
    if len(os.fsencode(path)) <= _LONGEST_PATH:
        return path
    folder = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    return f"/proc/self/fd/{folder}/{os.path.basename(path)}"


class _Called(str):
    """A name of dom0 that does not equal it."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return other != _DOM0 and super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        return not self == other


def _with_dom0(run_service: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(run_service)
    def run(app: object, dest: str, *args: object, **kwargs: object) -> object:
        # for dom0 itself the client runs a program of the machine's /etc/qubes-rpc by
        # sudo; qrexec-client of the server has services of its own
        name = _Called(dest) if dest == _DOM0 else dest
        return run_service(app, name, *args, **kwargs)

    return run


def _with_qubes(
    find: Callable[[str], grp.struct_group],
) -> Callable[[str], grp.struct_group]:
    def getgrnam(name: str) -> grp.struct_group:
        """Find a group; that of dom0's users has the one who asks in it."""
        try:
            return find(name)
        except KeyError:
            if name != _GROUP:
                raise
            return grp.struct_group((_GROUP, "x", os.getgid(), [getpass.getuser()]))

    return getgrnam


def _run_next() -> None:
    """Import the module that this one has taken the place of, if there is one."""
    here = os.path.dirname(os.path.abspath(__file__))
    others = [path for path in sys.path if os.path.abspath(path or ".") != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


if _VARIABLE in os.environ:
    install(os.environ[_VARIABLE])
if __name__ == "sitecustomize":
    with contextlib.suppress(ImportError):
        _run_next()
