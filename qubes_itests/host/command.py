"""Programs of the host: bounded in time, with errors that tell the cause."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
from typing import IO, TYPE_CHECKING, Final

from qubes_itests.exc import DeadlineError
from qubes_itests.host.exc import CommandError, MissingToolError
from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

__all__ = [
    "CommandError",
    "output",
    "run",
    "search_path",
    "started",
    "tool_environment",
]

_TAIL = 2000
#: Seconds that a program has to end when it is asked to; then it is killed.
_ENDING_TIMEOUT: Final = 30.0
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
    return output(argv, input=input, timeout=timeout).decode(errors="surrogateescape")


def output(
    argv: Sequence[str | Path],
    *,
    input: bytes | None = None,  # noqa: A002
    timeout: float = 60,
) -> bytes:
    """Do the same as `run`, and return the very bytes."""
    pipe = subprocess.PIPE
    with started(argv, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        try:
            stdout, stderr = process.communicate(input or b"", timeout=timeout)
        except subprocess.TimeoutExpired as error:
            what = f"exit of {os.fspath(argv[0])}"
            raise DeadlineError(what, timeout, _tail(error.stderr)) from None
    if process.returncode:
        arguments = [os.fspath(argument) for argument in argv]
        raise CommandError(arguments, process.returncode, _tail(stderr))
    return stdout


@contextlib.contextmanager
def started(
    argv: Sequence[str | Path],
    *,
    stdin: int | IO[bytes],
    stdout: int | IO[bytes],
    stderr: int | IO[bytes],
    environment: Mapping[str, str] | None = None,
    ending: signal.Signals = signal.SIGKILL,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program while the context lasts, and end what is left of it then.

    It leads a process group: a deadline ends its children too, and Ctrl-C reaches us
    first, who then end it in order.  Its umask is 022.

    :param argv: program and arguments; no shell is involved.
    :param stdin: as for `subprocess.Popen`, like the other two.
    :param environment: by default `tool_environment`.
    :param ending: the signal for the group if the program still runs at the end.
    :raises MissingToolError: the program is not installed.
    """
    try:
        process = subprocess.Popen(
            [os.fspath(argument) for argument in argv],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=tool_environment() if environment is None else environment,
            # modes of what it makes are no matter of the caller's
            umask=0o022,
            process_group=0,
        )
    except FileNotFoundError:
        raise MissingToolError(os.fspath(argv[0])) from None
    try:
        yield process
    finally:
        # Only if it was not waited for: its number is that of the group, and could be
        # another's by now. Not `poll`, which waits for one that has ended: children
        # that it has left may live, and hold its pipes.
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, ending)
            try:
                process.wait(_ENDING_TIMEOUT)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                # A daemon that left the group may hold the other end for ever.
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def _tail(stderr: bytes | None) -> str:
    return safe_text((stderr or b"")[-_TAIL:].strip(), lines=True, limit=None)
