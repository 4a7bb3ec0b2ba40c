"""Run the host's programs: bounded in time, with errors that tell the cause."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from typing import TYPE_CHECKING

from qubes_itests.exc import DeadlineError
from qubes_itests.host.exc import CommandError, MissingToolError
from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["CommandError", "run"]

_TAIL = 2000


def run(
    argv: Sequence[str | Path],
    *,
    input: bytes | None = None,  # noqa: A002  # subprocess calls it so
    timeout: float = 60,
) -> str:
    """Run a program to its end and return what it wrote to standard output.

    Messages are English whatever the locale, so that callers may read them.

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
            env={**os.environ, "LC_ALL": "C.UTF-8", "LANGUAGE": ""},
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
