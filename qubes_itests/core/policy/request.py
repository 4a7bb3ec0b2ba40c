"""A call as the policy sees it: checked, and resolved to the VMs that it is about."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from qubes_itests.core.exc import QubesValueError
from qubes_itests.core.policy.policy_errors import RequestError
from qubes_itests.core.policy.tokens import REQUESTED, Kind, Token
from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from qubes_itests.core.app import Qubes
    from qubes_itests.core.vm.base import BaseVM

__all__ = ["Destination", "Request", "shown"]

#: A service is a file's name in the guest.
_LONGEST_SERVICE: Final = 255
#: As much as the protocol of qrexec has room for.
_LONGEST_TARGET: Final = 63
_SERVICE: Final = re.compile(r"([A-Za-z0-9_.-]+)(\+[A-Za-z0-9_.+-]*)?")
_HARMLESS: Final = re.compile(r"[A-Za-z0-9_.+@-][A-Za-z0-9_.+@:-]{0,254}")
_LONGEST_SHOWN: Final = 100


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

        :raise RequestError: for a disposable VM of what is no template for them.
        """
        if token.kind is Kind.NAME:
            vm = app.domains.get(token.key)
            return None if vm is None else cls(token, vm=vm)
        if token.kind is Kind.DISPVM:
            return cls(token, base=getattr(source, "default_dispvm", None))
        if token.kind is Kind.DISPVM_TEMPLATE:
            base = app.domains.get(token.key)
            if not getattr(base, "template_for_dispvms", False):
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
                return self.base is not None and _is_base_with(self.base, token.value)
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
        vm: Any = self.vm
        return vm is not None and vm.get_power_state() == "Running"


def _is(vm: BaseVM, token: Token) -> bool:
    match token.kind:
        case Kind.TAG:
            return token.value in vm.tags
        case Kind.TYPE:
            return token.value == vm.klass
        case _:
            return token.names(vm)


def _is_base_with(base: BaseVM, tag: str) -> bool:
    return getattr(base, "template_for_dispvms", False) and tag in base.tags


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
        :raise RequestError: when nobody can ask for that.
        """
        found = _SERVICE.fullmatch(service)
        if found is None or len(service) > _LONGEST_SERVICE:
            raise RequestError(f"{shown(service)} is no name of a service")
        token = _check_target(target)
        # a VM that is not there is answered as Qubes OS does: as if none was named
        default = Destination(Token(Kind.DEFAULT))
        destination = Destination.resolve(app, source, token) or default
        return cls(app, found[1], found[2] or "+", source, destination)

    def asks_for(self, token: Token) -> bool:
        """Tell whether a rule's target matches what is asked for."""
        return self.destination.is_meant_by(token)

    def comes_from(self, token: Token) -> bool:
        """Tell whether a rule's source matches the VM that calls."""
        is_admin = self.source.klass == "AdminVM"
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


def _check_target(target: str) -> Token:
    word = "@" + target[1:] if target.startswith("$") else target or "@default"
    if len(word) > _LONGEST_TARGET:
        raise RequestError(f"the target {shown(word)} is too long")
    try:
        return Token.parse(word, REQUESTED)
    except QubesValueError:
        raise RequestError(f"{shown(word)} is no target of a call") from None
