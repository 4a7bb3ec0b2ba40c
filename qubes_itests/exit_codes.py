"""The exit statuses of the command line, all in one table.

0 to 5 are pytest's own and keep their meaning.
"""

from __future__ import annotations

import enum

__all__ = ["ExitCode"]


class ExitCode(enum.IntEnum):
    """What the exit status of ``itests`` and ``run-tests`` says."""

    OK = 0
    TESTS_FAILED = 1
    INTERRUPTED = 2
    INTERNAL_ERROR = 3
    USAGE_ERROR = 4
    NO_TESTS_COLLECTED = 5

    NOT_ROOT = 10
    NO_LOOP_DEVICES = 11
    MISSING_TOOL = 12
    NO_SANDBOX = 13
    NO_KERNEL = 14
    NO_NETWORK = 15

    LEAKED_RESOURCE = 20
    GUEST_PANIC = 21
    FLAKY = 22
