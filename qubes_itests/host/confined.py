"""Programs that prepare something in a directory, and end with us however we end.

They have separate mount, PID and IPC namespaces: what they mount and what they
leave running goes with them. They find the directory at a plain name, whatever it is
called and however its filesystem is mounted: options of mmdebstrap, apt and overlayfs
have no way, or each another one, to quote blanks, commas, colons and line breaks.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["FOLLOW_US", "PLACE", "confined"]

#: Put before a command, it is killed when the thread that started it ends.
FOLLOW_US: Final = ("setpriv", "--pdeathsig", "KILL", "--")
#: Where the program finds the directory, which is also its current one.
PLACE: Final = Path("/dev/shm/place")  # noqa: S108 - a mount of the program's own
#: $0 is the place, $1 the directory, the rest the program. What lies on a filesystem
#: that is mounted `noexec` may run: the program has put it there.
_SCRIPT: Final = """\
cd "$1"
mount -t tmpfs -o size=64m,mode=1777 none "${0%/*}"
mkdir "$0"
mount --no-canonicalize --bind . "$0"
mount -o remount,bind,exec,suid,dev "$0"
cd "$0"
shift
exec "$@"
"""
#: `--kill-child` has the program end with unshare, and FOLLOW_US has unshare end with
#: us: each of them alone would leave the other's child running after a kill -9.
_NAMESPACES: Final = (
    *("unshare", "--mount", "--pid", "--ipc", "--fork", "--kill-child"),
    *("--mount-proc", "--"),
)


def confined(
    directory: Path, command: Sequence[str | Path], place: Path = PLACE
) -> list[str | Path]:
    """Return the command line that runs a program on a directory; only root may.

    :param directory: it may write there.
    :param command: the program and its arguments, which name the directory `place`.
    :param place: below a directory that there is, whose contents the program does
        not see.
    """
    shell = ("sh", "-ec", _SCRIPT, place, directory)
    return [*FOLLOW_US, *_NAMESPACES, *shell, *command]
