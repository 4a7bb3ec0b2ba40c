"""Where the files are that an app names: in its repository, or in one beside it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Repositories"]

_OTHER: Final = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]*):(.+)")


@dataclass(frozen=True, slots=True)
class Repositories:
    """Finds files by the words in a section.

    :param own: the directory of the file with the section.
    :param named: other directories, by their names.
    """

    own: Path
    named: Mapping[str, Path] = field(default_factory=dict)

    def find(self, word: str) -> Path:
        """Return the file or directory that a word names.

        :param word: a path in the own directory, or ``NAME:PATH`` in that of another
            repository: a named one, or one that lies beside the own or a named one.
        :raise ValueError: there is none, or it is outside of the repository.
        """
        other = _OTHER.fullmatch(word)
        base, path = (self._other(other[1]), other[2]) if other else (self.own, word)
        found = Path(os.path.normpath(base / path))
        real = found.resolve()
        if Path(path).is_absolute() or not real.is_relative_to(base.resolve()):
            raise ValueError(f"{word!r} is not in {base}")
        if not (found.is_file() or found.is_dir()):
            raise ValueError(f"there is no file or directory {word!r}")
        return real

    def _other(self, name: str) -> Path:
        parents = (place.parent for place in (self.own, *self.named.values()))
        beside = list(dict.fromkeys(parent / name for parent in parents))
        for found in [self.named[name]] if name in self.named else beside:
            if found.is_dir():
                return found
        places = ", ".join(map(str, beside))
        raise ValueError(
            f"there is no repository {name!r}: neither --repository nor --app names a"
            f" directory that is called so, and there is no {places}"
        )
