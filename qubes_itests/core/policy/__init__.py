"""qrexec policy: which VM may call which service where.

The language is that of the files in ``/etc/qubes/policy.d``: `docs/policy.md` shows it.
"""

from qubes_itests.core.policy.decision import (
    AskHandler,
    Decision,
    Question,
    RequestError,
)
from qubes_itests.core.policy.policy import Policy, evaluate
from qubes_itests.core.policy.rule import (
    Action,
    Origin,
    PolicyError,
    PolicyFileError,
    PolicySyntaxError,
    Rule,
)

__all__ = [
    "Action",
    "AskHandler",
    "Decision",
    "Origin",
    "Policy",
    "PolicyError",
    "PolicyFileError",
    "PolicySyntaxError",
    "Question",
    "RequestError",
    "Rule",
    "evaluate",
]
