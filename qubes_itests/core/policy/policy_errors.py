"""What can be wrong with a policy, or with a call that it is asked about.

::

    QubesValueError
     +-- PolicyError                what is written cannot be used
     |    +-- PolicySyntaxError     a line of it cannot be understood
     |    +-- PolicyFileError       a file or directory of it cannot be read
     +-- RequestError               a call asks for what nobody can ask for
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qubes_itests.core.exc import QubesValueError

if TYPE_CHECKING:
    from pathlib import Path

    from qubes_itests.core.policy.rule import Origin

__all__ = ["PolicyError", "PolicyFileError", "PolicySyntaxError", "RequestError"]

#: So much of a line is enough to find it by.
_SHOWN: Final = 200


class PolicyError(QubesValueError):
    """What is written as policy cannot be used: mend it where the message says."""


class PolicySyntaxError(PolicyError):
    """A line of a policy cannot be understood.

    :param line: the line.
    :param reason: what is wrong with it.
    :param origin: the file and the line's number, None if it is in no file.
    """

    def __init__(self, line: str, reason: str, origin: Origin | None = None) -> None:
        where = "policy line" if origin is None else f"{origin}: policy line"
        super().__init__(f"{where} {line[:_SHOWN]!r}: {reason}")
        self.line = line
        self.reason = reason
        self.origin = origin


class PolicyFileError(PolicyError):
    """A file or a directory of a policy cannot be read.

    :param path: the file or directory.
    :param reason: what the system, or the policy, has against it.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


class RequestError(QubesValueError):
    """A call names a service or a target that nobody can ask for; it is denied.

    :param reason: what it asked for, and why that cannot be.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
