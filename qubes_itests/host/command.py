"""Run the host's programs: bounded in time, with errors that tell the cause."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
from typing import TYPE_CHECKING, Final

from qubes_itests.exc import DeadlineError
from qubes_itests.host.exc import CommandError, MissingToolError
from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["UMASK", "CommandError", "run", "search_path", "tool_environment"]

#: Of the programs that are run: modes of what they make are no matter of the caller's.
UMASK: Final = 0o022
_TAIL = 2000
_SYSTEM_DIRECTORIES: Final = ("/usr/local/sbin", "/usr/sbin", "/sbin")
#: Who runs it, and how the network is reached. All else may change what a program
#: makes: CFLAGS, TAR_OPTIONS, XZ_DEFAULTS, MKE2FS_CONFIG, GIT_DIR, PYTHONPATH and more.
_KEPT: Final = re.compile(
    r"HOME|USER|LOGNAME|LD_LIBRARY_PATH|APT_CONFIG|NETRC|SSH_AUTH_SOCK"
    r"|SSL_CERT_(?:FILE|DIR)|REQUESTS_CA_BUNDLE|QUBES_ITESTS_\w+"
    r"|(?i:\w+_proxy)"
)


def search_path() -> str:
    """Return where programs are looked for: PATH, and then the system's directories.

    A user's PATH lacks these on Debian, whatever the user may do by sudo.
    """
    named = os.environ.get("PATH") or os.defpath
    more = [name for name in _SYSTEM_DIRECTORIES if name not in named.split(os.pathsep)]
    return os.pathsep.join([named, *more])


def tool_environment() -> dict[str, str]:
    """Return an environment for programs of the host, of whose results some are kept.

    It has nothing of the caller's that shapes what they make. Messages are English
    whatever the locale, so that they may be read.
    """
    kept = {name: value for name, value in os.environ.items() if _KEPT.fullmatch(name)}
    fixed = {"PATH": search_path(), "LC_ALL": "C.UTF-8", "LANGUAGE": ""}
    # the caller's TMPDIR, if that is a directory
    return {**kept, **fixed, "TMPDIR": tempfile.gettempdir()}


def run(
    argv: Sequence[str | Path],
    *,
    input: bytes | None = None,  # noqa: A002  # subprocess calls it so
    timeout: float = 60,
) -> str:
    """Run a program to its end and return what it wrote to standard output.

    Its environment is `tool_environment`, its umask 022.

    :param argv: program and arguments; no shell is involved.
    :param input: bytes for its standard input; None is an empty input.
    :param timeout: seconds until the program and its children are killed.
    :raises MissingToolError: the program is not installed.
    :raises CommandError: it ended with another status than 0.
    :raises DeadlineError: it did not end in time.
    """
    arguments = [os.fspath(argument) for argument in argv]
    process = _start(arguments)
    try:
        stdout, stderr = process.communicate(input or b"", timeout=timeout)
    except subprocess.TimeoutExpired as error:
        _kill_group(process)
        what = f"exit of {arguments[0]}"
        raise DeadlineError(what, timeout, _tail(error.stderr)) from None
    except BaseException:
        _kill_group(process)
        raise
    if process.returncode:
        raise CommandError(arguments, process.returncode, _tail(stderr))
    return stdout.decode(errors="surrogateescape")


def _start(arguments: list[str]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=tool_environment(),
            umask=UMASK,
            # A group of its own: a deadline ends its children too, and Ctrl-C
            # reaches us first, who then end it in order.
            process_group=0,
        )
    except FileNotFoundError:
        raise MissingToolError(arguments[0]) from None


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            # A daemon that left the group may hold the other end for ever.
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _tail(stderr: bytes | None) -> str:
    return safe_text((stderr or b"")[-_TAIL:].strip(), lines=True, limit=None)
