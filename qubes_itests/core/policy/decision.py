"""Calls as the policy sees them, and its decisions about them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from qubes_itests.core.exc import QubesValueError
from qubes_itests.core.policy.rule import REDIRECT, REQUESTED, Action, Kind, Rule, Token
from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from qubes_itests.core.app import Qubes
    from qubes_itests.core.vm.base import BaseVM

__all__ = [
    "AskHandler",
    "Decision",
    "Destination",
    "Question",
    "Request",
    "RequestError",
    "decide",
    "denied",
    "shown",
]

log = logging.getLogger("qubes.policy")

#: A service is a file's name in the guest.
_LONGEST_SERVICE: Final = 255
#: As much as the protocol of qrexec has room for.
_LONGEST_TARGET: Final = 63
_SERVICE: Final = re.compile(r"([A-Za-z0-9_.-]+)(\+[A-Za-z0-9_.+-]*)?")
_HARMLESS: Final = re.compile(r"[A-Za-z0-9_.+@-][A-Za-z0-9_.+@:-]{0,254}")
#: The name of dom0, which no other VM can have.
_ADMIN: Final = "dom0"
_LONGEST_SHOWN: Final = 100


class RequestError(QubesValueError):
    """A call cannot be made as it is asked for; it is denied.

    :param reason: what was asked for, and what is wrong with it.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def shown(untrusted: str) -> str:
    """Return what a guest said so that it is safe to print on one line."""
    if _HARMLESS.fullmatch(untrusted):
        return untrusted
    return safe_text(ascii(untrusted[:_LONGEST_SHOWN]))


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a call leads.

    :param token: a VM, ``@adminvm``, ``@default``, ``@dispvm`` or ``@dispvm:NAME``.
    :param vm: the VM, for a name.
    :param base: what a disposable VM would be made from; None if there is nothing.
    """

    token: Token
    vm: BaseVM | None = None
    base: BaseVM | None = None

    @classmethod
    def resolve(cls, app: Qubes, source: BaseVM, token: Token) -> Destination | None:
        """Return where a token leads, None if it names a VM that is not there.

        :raise RequestError: for a disposable VM of a VM that is no template for them.
        """
        if token.kind is Kind.NAME:
            vm = app.domains.get(token.key)
            return None if vm is None else cls(token, vm=vm)
        if token.kind is Kind.DISPVM:
            return cls(token, base=source.default_dispvm_or_none)
        if token.kind is Kind.DISPVM_TEMPLATE:
            base = app.domains.get(token.key)
            if base is None or not base.makes_disposables:
                raise RequestError(f"{token.value} is no template for disposable VMs")
            return cls(token, base=base)
        return cls(token)

    def is_meant_by(self, token: Token) -> bool:
        """Tell whether a rule's target matches it."""
        match token.kind:
            case Kind.WILDCARD:
                return True
            case Kind.ANYVM:
                return self.token.kind is not Kind.ADMINVM
            case Kind.DISPVM_TEMPLATE:
                return self.base is not None and token.names(self.base)
            case Kind.DISPVM_TAG:
                base = self.base
                may = base is not None and base.makes_disposables
                return base is not None and may and token.value in base.tags
            case Kind.NAME | Kind.TAG | Kind.TYPE:
                return self.vm is not None and _is(self.vm, token)
            case _:
                return token == self.token

    @property
    def name(self) -> str:
        """How a decision names it: a VM, ``@adminvm``, ``@dispvm:NAME``; else empty."""
        if self.vm is not None:
            return self.vm.name
        if self.base is not None:
            return f"@dispvm:{self.base.name}"
        return "@adminvm" if self.token.kind is Kind.ADMINVM else ""

    @property
    def requested(self) -> str:
        """How the caller named it, a VM by its name."""
        return self.vm.name if self.vm is not None else str(self.token)

    def is_running(self) -> bool:
        """Tell whether a call to it would start nothing."""
        if self.token.kind is Kind.ADMINVM:
            return True
        return self.vm is not None and self.vm.get_power_state() == "Running"


def _is(vm: BaseVM, token: Token) -> bool:
    match token.kind:
        case Kind.TAG:
            return token.value in vm.tags
        case Kind.TYPE:
            return token.value == vm.klass
        case _:
            return token.names(vm)


@dataclass(frozen=True, slots=True)
class Request:
    """A call that the policy is asked about.

    :param app: the app of the VMs.
    :param service: the service's name.
    :param argument: ``+`` and the argument, which may be empty.
    :param source: the VM that calls.
    :param destination: what it asked for.
    """

    app: Qubes
    service: str
    argument: str
    source: BaseVM
    destination: Destination

    @classmethod
    def check(cls, app: Qubes, service: str, source: BaseVM, target: str) -> Request:
        """Check what a VM asks for.

        :param service: ``SERVICE`` or ``SERVICE+ARGUMENT``; not trusted.
        :param target: not trusted; empty as ``@default``, ``$`` before a keyword as @.
        :raise RequestError: when it is not valid.
        """
        found = _SERVICE.fullmatch(service)
        if found is None or len(service) > _LONGEST_SERVICE:
            raise RequestError(f"{shown(service)} is no name of a service")
        word = "@" + target[1:] if target.startswith("$") else target or "@default"
        if len(word) > _LONGEST_TARGET:
            raise RequestError(f"the target {shown(word)} is too long")
        try:
            token = Token.parse(word, REQUESTED)
        except QubesValueError:
            raise RequestError(f"{shown(word)} is no target of a call") from None
        # a VM that is not there is answered as Qubes OS does: as if none was named
        default = Destination(Token(Kind.DEFAULT))
        destination = Destination.resolve(app, source, token) or default
        return cls(app, found[1], found[2] or "+", source, destination)

    def asks_for(self, token: Token) -> bool:
        """Tell whether a rule's target matches what is asked for."""
        return self.destination.is_meant_by(token)

    def comes_from(self, token: Token) -> bool:
        """Tell whether a rule's source matches the VM that calls."""
        is_admin = self.source.name == _ADMIN
        match token.kind:
            case Kind.WILDCARD:
                return True
            case Kind.ANYVM:
                return not is_admin
            case Kind.ADMINVM:
                return is_admin
            case Kind.NAME | Kind.TAG | Kind.TYPE:
                return _is(self.source, token)
            case _:
                # a disposable VM calls under its own name, not its template's
                return False


@dataclass(frozen=True, slots=True)
class Decision:
    """What the policy says of one call.

    :param allowed: whether it may be made.
    :param target: what answers it: a VM's name, ``@adminvm`` or ``@dispvm:NAME``; empty
        if it is denied.
    :param user: the user it runs as, None for the default.
    :param rule: the rule that decided, None if no rule did.
    :param reason: one sentence, for the log; not for the caller.
    :param notify: whether a user should be told.
    :param autostart: whether the target may be started for it.
    :param requested: what the caller asked for, which dom0's services act upon when a
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

    :param rules: the whole policy: the choice is among what it allows.
    :param ask: answers questions, or None.
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
    if destination.token.kind is Kind.DEFAULT:
        raise RequestError("neither the caller nor the rule names a target")
    if not destination.name:
        raise RequestError("the caller has no default_dispvm")
    if destination.name == request.source.name:
        raise RequestError("a VM cannot call itself")
    if not rule.autostart and not destination.is_running():
        raise RequestError(f"{destination.name} does not run, and autostart=no")
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


def _ask(
    request: Request, rule: Rule, rules: Sequence[Rule], ask: AskHandler | None
) -> Decision:
    offered = _choices(request, rule, rules)
    if not offered:
        raise RequestError("there is no target to choose from")
    if ask is None:
        raise RequestError("there is no handler that could ask a user")
    default = None
    if rule.default_target is not None:
        proposed = Destination.resolve(request.app, request.source, rule.default_target)
        default = proposed.name if proposed is not None else None
    question = Question(
        service=request.service + request.argument,
        source=request.source.name,
        requested=request.destination.requested,
        targets=tuple(offered),
        default=default if default in offered else None,
    )
    answer = _answer(ask, question)
    if answer not in offered:
        raise RequestError(f"asked, and answered by {answer!r}")
    return _allow(request, rule, _resolved(request, Token.parse(answer, REDIRECT)))


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


def _choices(request: Request, rule: Rule, rules: Sequence[Rule]) -> list[str]:
    """Return the targets to choose from, sorted.

    That is what `rule` redirects to; or else whatever the policy allows this source to
    call, or to be asked about, for this service.

    :param rule: the one that asks.
    :param rules: the whole policy.
    """
    found = (
        {d.name: d for d in _collect(request, rules)}
        if rule.redirect is None
        else {d.name: d for d in _expand(request, rule.redirect)}
    )
    return sorted(
        name
        for name, destination in found.items()
        if name and name != request.source.name
        if rule.autostart or destination.is_running()
    )


def _collect(request: Request, rules: Sequence[Rule]) -> Iterable[Destination]:
    found: dict[str, Destination] = {}
    # Of rules that name one target the first counts: so it is the last to be applied.
    for rule in reversed(rules):
        if not rule.matches_but_target(request):
            continue
        named = {d.name: d for d in _expand(request, rule.redirect or rule.target)}
        if rule.action is Action.DENY:
            found = {name: d for name, d in found.items() if name not in named}
        else:
            found |= named
    return found.values()


def _expand(request: Request, token: Token) -> Iterator[Destination]:
    if token.kind in (Kind.NAME, Kind.ADMINVM, Kind.DISPVM, Kind.DISPVM_TEMPLATE):
        yield from _resolve(request, token)
        return
    candidates = [*_resolve(request, Token(Kind.DISPVM))]
    for vm in request.app.domains:
        if vm.name == _ADMIN:
            candidates.append(Destination(Token(Kind.ADMINVM)))
            continue
        candidates.append(Destination(Token(Kind.NAME, vm.name), vm=vm))
        if vm.makes_disposables:
            template = Token(Kind.DISPVM_TEMPLATE, vm.name)
            candidates.append(Destination(template, base=vm))
    for candidate in candidates:
        if candidate.is_meant_by(token):
            yield candidate


def _resolve(request: Request, token: Token) -> Iterator[Destination]:
    try:
        found = Destination.resolve(request.app, request.source, token)
    except RequestError:
        return
    if found is not None:
        yield found
