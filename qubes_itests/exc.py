"""The errors of the harness, told apart by who must act.

::

    HarnessError
     +-- EnvironmentNotReadyError   the machine lacks something; `doctor` says what
     +-- DeadlineError              something was waited for and did not come
     +-- UsageError                 what was asked for cannot be done; it says why

The errors of every package derive from these, or from `qubes_storage.exc`.
"""

from __future__ import annotations

from qubes_itests.exit_codes import ExitCode
from qubes_itests.untrusted_text import quoted

__all__ = [
    "DeadlineError",
    "EnvironmentNotReadyError",
    "HarnessError",
    "UsageError",
]


class HarnessError(Exception):
    """The base of everything that qubes_itests raises on purpose."""

    #: Exit status of the command line when this error ends a run.
    exit_code = 3


class EnvironmentNotReadyError(HarnessError):
    """The machine lacks something that a run needs.

    :param problem: one sentence that says what is missing.
    :param remedy: the command, or the act, that mends it.
    :param exit_code: of the command line; by default that of the class.
    """

    exit_code = 10

    def __init__(self, problem: str, remedy: str, exit_code: int | None = None) -> None:
        super().__init__(f"{problem} {remedy}".strip())
        self.exit_code = exit_code or self.exit_code
        self.problem = problem
        self.remedy = remedy


class DeadlineError(HarnessError, TimeoutError):
    """Something that was waited for did not come in time.

    :param waited_for: what it was, as a noun phrase.
    :param timeout: how long, in seconds.
    :param evidence: the last that was seen (a console's tail, a libvirt error).
    """

    def __init__(self, waited_for: str, timeout: float, evidence: str = "") -> None:
        message = f"no {waited_for} within {timeout:g} s"
        if evidence:
            message += f"; last seen:\n{quoted(evidence)}"
        super().__init__(message)
        self.waited_for = waited_for
        self.timeout = timeout
        self.evidence = evidence


class UsageError(HarnessError):
    """What was asked for cannot be done; the text says why."""

    exit_code = ExitCode.USAGE_ERROR
