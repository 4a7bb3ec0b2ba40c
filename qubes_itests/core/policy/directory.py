"""The policy that an app begins with: that of Qubes OS, and what is added to it.

`default` beside this module is equivalent in effect to what Qubes OS ships in
/etc/qubes/policy.d, where all services of the Admin API are denied.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qubes_itests.core.policy.files import PolicyFiles
from qubes_itests.core.policy.policy_errors import PolicyFileError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["DEFAULT_POLICY", "PolicyFile", "fill", "find_error"]

#: Where Qubes OS has them, below /etc/qubes and /etc/qubes-rpc.
_CURRENT: Final = "policy.d"
_LEGACY: Final = "policy"


@dataclass(frozen=True, slots=True)
class PolicyFile:
    """A file that becomes part of a policy, or a directory whose files do.

    :param source: the file or directory.
    :param service: ``SERVICE`` or ``SERVICE+ARGUMENT`` that a file in the format of
        Qubes OS 4.0 is for; empty for the current format.
    """

    source: Path
    service: str = ""

    def parts(self) -> Iterator[tuple[str, Path]]:
        """Yield the files, with their names in the directory of an app.

        :raise PolicyFileError: there is nothing, or nothing to be read.
        """
        if self.source.is_file():
            name = self.service or self.source.name
            yield f"{_LEGACY if self.service else _CURRENT}/{name}", self.source
            return
        try:
            found = sorted(self.source.rglob("*"))
        except OSError as error:
            raise PolicyFileError(self.source, str(error)) from error
        if not self.source.is_dir():
            raise PolicyFileError(self.source, "there is no such file or directory")
        for path in found:
            if path.is_file():
                yield f"{_CURRENT}/{path.relative_to(self.source)}", path


DEFAULT_POLICY: Final = PolicyFile(Path(__file__).parent / "default")


def fill(directory: Path, files: Iterable[PolicyFile]) -> None:
    """Make the directories of an app's policy: the default, and these files.

    Of files with one name the last counts, so the default can be replaced.

    :param directory: the app's.
    :raise PolicyFileError: when a file cannot be read.
    """
    for name, source in _parts(files).items():
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(source, target)
        except OSError as error:
            reason = error.strerror or str(error)
            raise PolicyFileError(source, reason) from error
    # `!compat-4.0` of the default reads it
    (directory / _LEGACY).mkdir(exist_ok=True)


def _parts(files: Iterable[PolicyFile]) -> dict[str, Path]:
    return {name: path for f in (DEFAULT_POLICY, *files) for name, path in f.parts()}


def find_error(files: Iterable[PolicyFile]) -> str:
    """Return what is wrong with a policy of these files, empty if nothing is.

    :return: the file, the line, and what is wrong with it.
    """
    files = tuple(files)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        try:
            fill(directory, files)
        except PolicyFileError as error:
            return str(error)
        read = PolicyFiles(directory / _CURRENT, directory / _LEGACY)
        read.refresh()
        text = str(read.loaded.error or "")
    for part, source in _parts(files).items():
        # the user knows the file by its own name
        text = text.replace(str(directory / part), str(source))
    return text
