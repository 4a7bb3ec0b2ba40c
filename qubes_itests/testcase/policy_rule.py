"""A qrexec policy rule for the time of a test."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from qubes_itests.core.policy import Policy

__all__ = ["PolicyRule", "policy_line"]


class PolicyRule:
    """A rule that is in force from now on, until it is left as a context, or removed.

    :param policy: the app's.
    :param line: as in a policy file.
    """

    def __init__(self, policy: Policy, line: str) -> None:
        self._policy = policy
        self._rule = policy.add_rule(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the rule back; nothing if that was done before."""
        with contextlib.suppress(ValueError):
            self._policy.remove_rule(self._rule)


def policy_line(
    service: str, source: Any, destination: Any, action: str, target: Any = None
) -> str:
    """Return a line of a policy file.

    :param service: ``SERVICE`` for all arguments, or ``SERVICE+ARGUMENT`` for one.
    :param source: the VM that calls, its name, or a keyword.
    :param destination: the VM that is called, its name, or a keyword.
    :param action: ``allow`` or ``deny``.
    :param target: the VM that answers instead.
    """
    name, plus, argument = service.partition("+")
    # tests are older than policy files of today, in which keywords begin with @
    ends = (re.sub(r"\A\$", "@", str(end)) for end in (source, destination))
    words = [name, plus + argument or "*", *ends, action]
    if target is not None and action == "allow":
        words.append(f"target={target}")
    return " ".join(words)
