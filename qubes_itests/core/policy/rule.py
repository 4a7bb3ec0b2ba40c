"""One line of a policy."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Self

from qubes_itests.core.exc import QubesValueError
from qubes_itests.core.policy.policy_errors import PolicySyntaxError
from qubes_itests.core.policy.tokens import REDIRECT, SOURCE, TARGET, Kind, Token

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from qubes_itests.core.policy.request import Request

__all__ = ["Action", "Origin", "Rule", "check_service"]

_SERVICE: Final = re.compile(r"[A-Za-z0-9_.-]+")
_ARGUMENT: Final = re.compile(r"\+[A-Za-z0-9_.+-]*")
_USER: Final = re.compile(r"[A-Za-z0-9_.@\\-]+")
_FIELDS: Final = 5


class Action(enum.StrEnum):
    """What a rule does with the calls that it matches."""

    ALLOW = "allow"
    DENY = "deny"
    ASK = "ask"


_ALLOW_TAKES: Final = ("target", "user", "notify", "autostart")
_TAKES: Final[Mapping[Action, tuple[str, ...]]] = {
    Action.ALLOW: _ALLOW_TAKES,
    Action.DENY: ("notify",),
    Action.ASK: (*_ALLOW_TAKES, "default_target"),
}


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a rule is written.

    :param file: the file, as a path.
    :param line: the line's number, from 1; 0 for a rule that the file implies.
    """

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else f"{self.file} (implied)"


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of a policy.

    :param service: name of the service, or ``*``.
    :param argument: ``*``, ``+`` for none, or ``+ARGUMENT``.
    :param source: who calls.
    :param target: what the caller asked for.
    :param action: what becomes of the call.
    :param redirect: who answers in place of the target (``target=``).
    :param default_target: what the one who is asked may just confirm.
    :param user: the user of the target that the service runs as; None for its default.
    :param notify: whether a user should be told; None where the rule does not say.
    :param autostart: whether a target that is halted is started.
    :param origin: where it is written, None if it was added by a program.
    """

    service: str
    argument: str
    source: Token
    target: Token
    action: Action
    redirect: Token | None = None
    default_target: Token | None = None
    user: str | None = None
    notify: bool | None = None
    autostart: bool = True
    origin: Origin | None = field(default=None, compare=False)

    @classmethod
    def parse(
        cls, line: str, origin: Origin | None = None, *, strict: bool = True
    ) -> Self:
        """Read a line ``SERVICE ARGUMENT SOURCE TARGET ACTION [PARAMETER=VALUE …]``.

        :param origin: where the line is.
        :param strict: whether names have to be such that something can have them; see
            `doubt`.
        :raise PolicySyntaxError: when it is none; the message says why.
        """
        words = line.split()
        if len(words) < _FIELDS:
            reason = "it needs SERVICE ARGUMENT SOURCE TARGET ACTION"
            raise PolicySyntaxError(line, reason, origin)
        try:
            return cls._from_words(words, origin, strict=strict)
        except QubesValueError as error:
            raise PolicySyntaxError(line, str(error), origin) from None

    @classmethod
    def _from_words(
        cls, words: list[str], origin: Origin | None, *, strict: bool
    ) -> Self:
        service, argument, source, target, action, *parameters = words
        check_service(service, argument)
        given = _parse_parameters(_parse_action(action), parameters)
        rule = cls(
            service,
            argument,
            Token.parse(source, SOURCE, strict=strict),
            Token.parse(target, TARGET, strict=strict),
            _parse_action(action),
            redirect=_parse_redirect(given.get("target"), strict=strict),
            default_target=_parse_redirect(given.get("default_target"), strict=strict),
            user=_parse_user(given.get("user"), strict=strict),
            notify=_parse_choice("notify", given),
            autostart=_parse_choice("autostart", given) is not False,
            origin=origin,
        )
        if (rule.target.kind, rule.action, rule.redirect) == _LEADS_NOWHERE:
            raise QubesValueError("allow for @default needs target=")
        return rule

    def __str__(self) -> str:
        words = [self.service, self.argument, self.source, self.target, self.action]
        return " ".join([*map(str, words), *self._parameters()])

    def _parameters(self) -> Iterable[str]:
        if self.redirect is not None:
            yield f"target={self.redirect}"
        if self.default_target is not None:
            yield f"default_target={self.default_target}"
        if self.user is not None:
            yield f"user={self.user}"
        if self.notify is not None:
            yield f"notify={'yes' if self.notify else 'no'}"
        if not self.autostart:
            yield "autostart=no"

    @property
    def shown(self) -> str:
        """Itself, and where it is written: for people to read."""
        return f"{self.origin or 'added'}: {self}"

    @property
    def doubt(self) -> str:
        """Why it can speak of nothing, or lead nowhere; empty if all is well."""
        tokens = (self.source, self.target, self.redirect, self.default_target)
        return next((t.doubt for t in tokens if t is not None and t.doubt), "")

    def matches(self, request: Request) -> bool:
        """Tell whether it matches this call."""
        return self.matches_but_target(request) and request.asks_for(self.target)

    def matches_but_target(self, request: Request) -> bool:
        """Tell whether it matches this service, argument and source."""
        return (
            self.service in ("*", request.service)
            and self.argument in ("*", request.argument)
            and request.comes_from(self.source)
        )


_LEADS_NOWHERE: Final = (Kind.DEFAULT, Action.ALLOW, None)


def check_service(service: str, argument: str) -> None:
    """Raise QubesValueError unless these may begin a rule."""
    if service != "*" and not _SERVICE.fullmatch(service):
        raise QubesValueError(f"{service!r} is no name of a service")
    if argument == "*":
        return
    if not _ARGUMENT.fullmatch(argument):
        raise QubesValueError(
            f"the argument is *, + or +ARGUMENT (of letters, digits, + . _ -),"
            f" not {argument!r}"
        )
    if service == "*":
        raise QubesValueError("service * goes with argument * only")


def _parse_action(word: str) -> Action:
    try:
        return Action(word)
    except ValueError:
        raise QubesValueError(
            f"the action is one of {', '.join(Action)}, not {word!r}"
        ) from None


def _parse_parameters(action: Action, words: list[str]) -> dict[str, str]:
    given: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in _TAKES[action]:
            raise QubesValueError(f"{action} takes no parameter {word!r}")
        if name in given:
            raise QubesValueError(f"parameter {name!r} is given twice")
        given[name] = value
    return given


def _parse_redirect(value: str | None, *, strict: bool) -> Token | None:
    return None if value is None else Token.parse(value, REDIRECT, strict=strict)


def _parse_user(value: str | None, *, strict: bool) -> str | None:
    if strict and value is not None and not _USER.fullmatch(value):
        raise QubesValueError(f"{value!r} is no name of a user")
    return value or None


def _parse_choice(name: str, given: dict[str, str]) -> bool | None:
    value = given.get(name)
    if value not in (None, "yes", "no"):
        raise QubesValueError(f"{name} is yes or no, not {value!r}")
    return None if value is None else value == "yes"
