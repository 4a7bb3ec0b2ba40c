"""Among which targets one may choose who is asked about a call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qubes_itests.core.policy.policy_errors import RequestError
from qubes_itests.core.policy.request import Destination
from qubes_itests.core.policy.rule import Action
from qubes_itests.core.policy.tokens import Kind, Token

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from qubes_itests.core.policy.request import Request
    from qubes_itests.core.policy.rule import Rule

__all__ = ["choices"]


def choices(request: Request, rule: Rule, rules: Sequence[Rule]) -> list[str]:
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
    # the first rule wins, so that the last comes first
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
    for candidate in _everything(request):
        if candidate.is_meant_by(token):
            yield candidate


def _everything(request: Request) -> Iterator[Destination]:
    for vm in request.app.domains:
        if vm.klass == "AdminVM":
            yield Destination(Token(Kind.ADMINVM))
            continue
        yield Destination(Token(Kind.NAME, vm.name), vm=vm)
        if getattr(vm, "template_for_dispvms", False):
            yield Destination(Token(Kind.DISPVM_TEMPLATE, vm.name), base=vm)
    yield from _resolve(request, Token(Kind.DISPVM))


def _resolve(request: Request, token: Token) -> Iterator[Destination]:
    try:
        found = Destination.resolve(request.app, request.source, token)
    except RequestError:
        return
    if found is not None:
        yield found
