"""What the policy says of a call, by the first rule that matches it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qubes_itests.core.policy.policy_errors import RequestError
from qubes_itests.core.policy.request import Destination
from qubes_itests.core.policy.rule import Action, Rule
from qubes_itests.core.policy.targets import choices
from qubes_itests.core.policy.tokens import REDIRECT, Kind, Token

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qubes_itests.core.policy.request import Request

__all__ = ["AskHandler", "Decision", "Question", "decide", "denied"]

log = logging.getLogger("qubes.policy")


@dataclass(frozen=True, slots=True)
class Decision:
    """What the policy says of one call.

    :param allowed: whether it may be made.
    :param target: who answers it: a VM's name, ``@adminvm`` or ``@dispvm:NAME``; empty
        if it is denied.
    :param user: the user it runs as, None for the default.
    :param rule: the rule that decided, None if no rule did.
    :param reason: one sentence, for the log; not for the caller.
    :param notify: whether a user should be told.
    :param autostart: whether the target may be started for it.
    :param requested: whom the caller asked for, which dom0's services act upon when a
        rule redirects to them: a VM's name or a keyword; empty if that was not valid.
    """

    allowed: bool
    target: str
    user: str | None
    rule: Rule | None
    reason: str
    notify: bool = False
    autostart: bool = True
    requested: str = ""


@dataclass(frozen=True, slots=True)
class Question:
    """What a rule ``ask`` asks.

    :param service: ``SERVICE+ARGUMENT``; the ``+`` is always there.
    :param source: name of the VM that calls.
    :param requested: what it asked for.
    :param targets: who may answer, sorted: as in `Decision.target`.
    :param default: the one of them that the rule proposes, None if none.
    """

    service: str
    source: str
    requested: str
    targets: tuple[str, ...]
    default: str | None


#: Answers a question by one of its targets, or by None to refuse.
AskHandler = Callable[[Question], str | None]


def denied(
    reason: str, rule: Rule | None = None, *, requested: str = "", notify: bool = True
) -> Decision:
    """Return the decision that denies a call."""
    return Decision(
        allowed=False,
        target="",
        user=None,
        rule=rule,
        reason=reason,
        notify=notify,
        requested=requested,
    )


def decide(
    request: Request, rule: Rule, rules: Sequence[Rule], ask: AskHandler | None
) -> Decision:
    """Return what becomes of a call by the rule that matches it.

    :param rules: the whole policy: who is asked may choose from what it allows.
    :param ask: answers questions, None if nobody is there.
    """
    if rule.action is Action.DENY:
        return _refuse(request, rule, rule.shown, notify=rule.notify is not False)
    try:
        if rule.action is Action.ASK:
            return _ask(request, rule, rules, ask)
        return _allow(request, rule, _destination(request, rule))
    except RequestError as error:
        reason = f"{error.reason}; {rule.shown}"
        return _refuse(request, rule, reason, notify=bool(rule.notify))


def _refuse(request: Request, rule: Rule, reason: str, *, notify: bool) -> Decision:
    requested = request.destination.requested
    return denied(reason, rule, requested=requested, notify=notify)


def _destination(request: Request, rule: Rule) -> Destination:
    if rule.redirect is None:
        return request.destination
    return _resolved(request, rule.redirect)


def _resolved(request: Request, token: Token) -> Destination:
    found = Destination.resolve(request.app, request.source, token)
    if found is None:
        raise RequestError(f"there is no VM {token.value!r}")
    return found


def _allow(request: Request, rule: Rule, destination: Destination) -> Decision:
    _check_leads_somewhere(request, rule, destination)
    return Decision(
        allowed=True,
        target=destination.name,
        user=rule.user,
        rule=rule,
        reason=rule.shown,
        notify=bool(rule.notify),
        autostart=rule.autostart,
        requested=request.destination.requested,
    )


def _check_leads_somewhere(
    request: Request, rule: Rule, destination: Destination
) -> None:
    if destination.token.kind is Kind.DEFAULT:
        raise RequestError("neither the caller nor the rule names a target")
    if not destination.name:
        raise RequestError("the caller has no default_dispvm")
    if destination.name == request.source.name:
        raise RequestError("a VM cannot call itself")
    if not rule.autostart and not destination.is_running():
        raise RequestError(f"{destination.name} does not run, and autostart=no")


def _ask(
    request: Request, rule: Rule, rules: Sequence[Rule], ask: AskHandler | None
) -> Decision:
    offered = choices(request, rule, rules)
    if not offered:
        raise RequestError("there is no target to choose from")
    if ask is None:
        raise RequestError("nobody is there to ask")
    answer = _answer(ask, _question(request, rule, offered))
    if answer not in offered:
        raise RequestError(f"asked, and answered by {answer!r}")
    return _allow(request, rule, _resolved(request, Token.parse(answer, REDIRECT)))


def _question(request: Request, rule: Rule, offered: Sequence[str]) -> Question:
    default = None
    if rule.default_target is not None:
        proposed = Destination.resolve(request.app, request.source, rule.default_target)
        default = proposed.name if proposed is not None else None
    return Question(
        service=request.service + request.argument,
        source=request.source.name,
        requested=request.destination.requested,
        targets=tuple(offered),
        default=default if default in offered else None,
    )


def _answer(ask: AskHandler, question: Question) -> str:
    try:
        answer = ask(question)
    except Exception as error:  # noqa: BLE001 - the handler is anybody's
        # without its traceback, which would keep VMs alive in the record
        log.error("%s could not be asked about: %s", question, str(error))  # noqa: TRY400
        raise RequestError(f"asking failed: {error}") from None
    if answer is None:
        raise RequestError("asked, and refused")
    return answer
