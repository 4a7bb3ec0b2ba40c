"""Modules of installed apps that name the files of their authors.

The tests of an app run from an installed copy. What Python compiles of it bears the
name of the file in the app's repository that it is a copy of, byte for byte: so
tracebacks, debuggers and reports name what an author can edit. A module that is loaded
once more is what its author has made of that file since.
"""

from __future__ import annotations

import sys
from importlib.machinery import (
    BYTECODE_SUFFIXES,
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    SourceFileLoader,
    SourcelessFileLoader,
)
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING

from qubes_itests.host.tree import Originals

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["name_authors_files"]


def name_authors_files(copies: Mapping[str, str]) -> None:
    """Have modules that are imported from now on name their authors' files.

    :param copies: directories of installed packages, each with that of its app.
    """
    for packages, app in copies.items():
        if (packages, app) in _finders:
            continue
        authored = _finders[packages, app] = _Authored(Path(packages), Path(app))
        sys.path_hooks.insert(0, authored.finder)
        # who has looked there before was another finder
        for path in [p for p in sys.path_importer_cache if authored.has(p)]:
            del sys.path_importer_cache[path]


#: By packages and app: only who has found a file before knows it when it was edited.
_finders: dict[tuple[str, str], _Authored] = {}


class _Authored:
    """The modules of one app.

    :param packages: where they are installed.
    :param app: the directory that they come from.
    """

    def __init__(self, packages: Path, app: Path) -> None:
        self._packages = packages
        self._originals = Originals(app)
        self._sources: dict[str, str] = {}

    def has(self, path: str) -> bool:
        """Return whether a directory is that of the packages, or below."""
        return Path(path).is_relative_to(self._packages)

    def finder(self, path: str) -> FileFinder:
        """Return what finds modules in a directory; ImportError if it is another's."""
        if not self.has(path):
            raise ImportError(path=path)
        authored = self

        class Loader(SourceFileLoader):
            def get_code(self, fullname: str) -> CodeType | None:
                source = authored.source(self.path)
                if source == self.path:
                    return super().get_code(fullname)
                written = self.get_data(source)
                if written != self.get_data(self.path):
                    return self.source_to_code(written, source)
                code = super().get_code(fullname)
                return code and _renamed(code, source)

        return FileFinder(
            path,
            (ExtensionFileLoader, EXTENSION_SUFFIXES),
            (Loader, SOURCE_SUFFIXES),
            (SourcelessFileLoader, BYTECODE_SUFFIXES),
        )

    def source(self, path: str) -> str:
        """Return the file that a module is or was a copy of; itself for none."""
        if path not in self._sources:
            self._sources[path] = str(self._originals.find(Path(path)) or path)
        return self._sources[path]


def _renamed(code: CodeType, name: str) -> CodeType:
    constants = tuple(
        _renamed(value, name) if isinstance(value, CodeType) else value
        for value in code.co_consts
    )
    return code.replace(co_filename=name, co_consts=constants)
