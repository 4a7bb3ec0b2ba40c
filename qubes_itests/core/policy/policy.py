"""The policy of an app: rules that programs added, then those of its files."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from qubes_itests.core.policy.decision import (
    Decision,
    Request,
    RequestError,
    decide,
    denied,
    shown,
)
from qubes_itests.core.policy.files import PolicyFiles
from qubes_itests.core.policy.rule import PolicyFileError, Rule
from qubes_itests.limited_log import LimitedLog
from qubes_itests.timeline import note

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from qubes_itests.core.app import Qubes
    from qubes_itests.core.policy.decision import AskHandler
    from qubes_itests.core.policy.rule import PolicyError
    from qubes_itests.core.vm.base import BaseVM

__all__ = ["Policy", "evaluate"]

log = logging.getLogger("qubes.policy")


class Policy:
    """The rules of an app, in the order in which they are asked.

    :param lines: rules to begin with.
    :param directory: of files ``*.policy``; one that does not exist has no rules.
    :param legacy: what ``!compat-4.0`` reads; by default ``policy`` beside `directory`.
    """

    def __init__(
        self,
        lines: Iterable[str] = (),
        *,
        directory: Path | None = None,
        legacy: Path | None = None,
    ) -> None:
        #: Those that were added; they come before those of the files.
        self.rules: list[Rule] = [Rule.parse(line) for line in lines]
        #: Answers rules ``ask``; while it is None, they deny.
        self.ask_handler: AskHandler | None = None
        self._files = PolicyFiles(directory, legacy)
        # a guest may call as often as it likes
        self._limited = LimitedLog(log)

    @property
    def error(self) -> PolicyError | None:
        """What is wrong with the files; while it is set, they deny everything."""
        return self._files.loaded.error

    @property
    def all_rules(self) -> tuple[Rule, ...]:
        """Those that were added, then those of the files as last refreshed."""
        return (*self.rules, *self._files.loaded.rules)

    def add_rule(self, rule: Rule | str, *, first: bool = True) -> Rule:
        """Add a rule before (or behind) all others that were added, and return it.

        :param rule: as in a file of ``policy.d``.
        :raise PolicySyntaxError: when it cannot be understood.
        """
        parsed = Rule.parse(rule) if isinstance(rule, str) else rule
        self.rules.insert(0 if first else len(self.rules), parsed)
        return parsed

    def remove_rule(self, rule: Rule) -> None:
        """Remove a rule that `add_rule` returned; ValueError if it is not there."""
        for index, known in enumerate(self.rules):
            if known is rule:
                del self.rules[index]
                return
        raise ValueError(f"the policy has no rule {rule}")

    def load_directory(self, directory: Path, legacy: Path | None = None) -> None:
        """Take the rules of the files from this directory, in place of any other's.

        They are read again whenever `refresh` finds them changed.

        :param directory: of files ``*.policy``, read in the order of their names.
        :param legacy: what ``!compat-4.0`` reads; by default ``policy`` beside it.
        :raise PolicyError: when they cannot be used; until they can, they deny
            everything.
        """
        if not directory.is_dir():
            raise PolicyFileError(directory, "expected a directory")
        self._files = PolicyFiles(directory, legacy)
        self.refresh()
        if self.error is not None:
            raise self.error

    def refresh(self) -> None:
        """Read the files again if one of them has changed; this blocks."""
        self._files.refresh()

    def evaluate(
        self, app: Qubes, service: str, source: BaseVM, target: str
    ) -> Decision:
        """Decide on a call, by the files as they were when last refreshed.

        :param service: ``SERVICE`` or ``SERVICE+ARGUMENT``; not trusted.
        :param source: the VM that calls.
        :param target: what it asked for, not trusted; a VM that does not exist is
            ``@default``.
        """
        try:
            request = Request.check(app, service, source, target)
            decision = self._decide(request, self.ask_handler)
        except RequestError as error:
            decision = denied(error.reason)
        # names, not VMs: who keeps records must not keep the VMs alive
        self._limited.info(
            source.name,
            "%s: %s -> %s: %s (%s)",
            shown(service),
            source.name,
            shown(target or "@default"),
            f"allowed to {decision.target}" if decision.allowed else "denied",
            decision.reason,
        )
        note(
            "policy",
            source.name,
            target=target or "@default",
            service=service,
            decision="allow" if decision.allowed else "deny",
            rule=decision.reason,
        )
        return decision

    def lets_know(self, app: Qubes, service: str, source: BaseVM, target: str) -> bool:
        """Tell whether it would allow a call, without making it.

        No user is asked, and nothing is logged.  The parameters are those of
        `evaluate`.
        """
        try:
            request = Request.check(app, service, source, target)
        except RequestError:
            return False
        return self._decide(request, None).allowed

    def _decide(self, request: Request, ask: AskHandler | None) -> Decision:
        rules, error = self.all_rules, self.error
        for rule in rules:
            if rule.matches(request):
                return decide(request, rule, rules, ask)
        reason = "no rule of the policy matches it"
        if error is not None:
            reason = f"the policy's files cannot be used: {error}"
        return denied(reason, requested=request.destination.requested)


async def evaluate(app: Qubes, service: str, source: BaseVM, target: str) -> Decision:
    """Decide on a call of a VM by the app's policy, its files as they are now.

    :param service: ``SERVICE`` or ``SERVICE+ARGUMENT``; not trusted.
    :param source: the VM that calls.
    :param target: what it asked for; not trusted.
    """
    await asyncio.to_thread(app.policy.refresh)
    return app.policy.evaluate(app, service, source, target)
