"""The name of this program, and what a person types to start it once more."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from typing import Final

__all__ = ["COMMAND", "NAME", "typed"]

#: The name of the program.
NAME: Final = "itests"
#: Set by the script that sets up and starts: how it was called itself.
_VARIABLE: Final = "QUBES_ITESTS_PROGRAM"


def _command() -> tuple[str, ...]:
    if program := os.environ.get(_VARIABLE):
        return (program,)
    # By os.path: of an environment the interpreter is a link to one elsewhere.
    beside = os.path.join(os.path.dirname(sys.executable), NAME)
    if shutil.which(NAME) == beside:
        return (NAME,)
    if os.access(beside, os.X_OK):
        return (beside,)
    return (sys.executable, "-m", __name__.partition(".")[0])


#: The words that start it from here, whichever way it was started: those of the script
#: that did, else of the one that was installed with this interpreter.
COMMAND: Final = _command()


def typed(*words: str) -> str:
    """Return a command line of this program, for a shell.

    :param words: what follows the program.
    """
    return shlex.join([*COMMAND, *words])
