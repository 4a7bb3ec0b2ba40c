"""Rules of a policy: its lines, and the words in them that stand for VMs.

::

    QubesValueError
     +-- PolicyError                what is written cannot be used
          +-- PolicySyntaxError     a line cannot be understood
          +-- PolicyFileError       a file or directory cannot be read
"""

from __future__ import annotations

import enum
import re
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Self

from qubes_itests.core.exc import QubesValueError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from qubes_itests.core.policy.decision import Request
    from qubes_itests.core.vm.base import BaseVM

__all__ = [
    "REDIRECT",
    "REQUESTED",
    "SOURCE",
    "TARGET",
    "Action",
    "Kind",
    "Origin",
    "PolicyError",
    "PolicyFileError",
    "PolicySyntaxError",
    "Rule",
    "Token",
    "check_service",
]

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_UUID: Final = re.compile(r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
_UUID_PREFIX: Final = "uuid:"
_UUID_OF_DOM0: Final = f"{_UUID_PREFIX}{uuid.UUID(int=0)}"

_SERVICE: Final = re.compile(r"[A-Za-z0-9_.-]+")
_ARGUMENT: Final = re.compile(r"\+[A-Za-z0-9_.+-]*")
_USER: Final = re.compile(r"[A-Za-z0-9_.@\\-]+")
_FIELDS: Final = 5
#: Characters of a line that an error shows.
_LONGEST_SHOWN: Final = 200


class PolicyError(QubesValueError):
    """A policy cannot be used; the message says where it is wrong."""


class PolicySyntaxError(PolicyError):
    """A line of a policy cannot be understood.

    :param line: the line.
    :param reason: what is wrong with it.
    :param origin: the file and the line's number, None if it is in no file.
    """

    def __init__(self, line: str, reason: str, origin: Origin | None = None) -> None:
        where = "policy line" if origin is None else f"{origin}: policy line"
        super().__init__(f"{where} {line[:_LONGEST_SHOWN]!r}: {reason}")
        self.line = line
        self.reason = reason
        self.origin = origin


class PolicyFileError(PolicyError):
    """A file or a directory of a policy cannot be read.

    :param path: the file or directory.
    :param reason: why it cannot be read, or is not accepted.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")


class Kind(enum.Enum):
    """What a word is; its value is how it is written, or how it begins."""

    NAME = ""
    WILDCARD = "*"
    ANYVM = "@anyvm"
    ADMINVM = "@adminvm"
    DEFAULT = "@default"
    DISPVM = "@dispvm"
    DISPVM_TAG = "@dispvm:@tag:"
    DISPVM_TEMPLATE = "@dispvm:"
    TAG = "@tag:"
    TYPE = "@type:"


#: What may stand where.
SOURCE: Final = frozenset(Kind) - {Kind.DEFAULT, Kind.DISPVM}
TARGET: Final = frozenset(Kind)
REDIRECT: Final = frozenset(
    {Kind.NAME, Kind.ADMINVM, Kind.DISPVM, Kind.DISPVM_TEMPLATE}
)
REQUESTED: Final = REDIRECT | {Kind.DEFAULT}

_PREFIXED: Final = (Kind.DISPVM_TAG, Kind.DISPVM_TEMPLATE, Kind.TAG, Kind.TYPE)
_NAMES_A_VM: Final = (Kind.NAME, Kind.DISPVM_TEMPLATE)


@dataclass(frozen=True, slots=True)
class Token:
    """One word.

    :param kind: what it is.
    :param value: a VM's name, or ``uuid:`` and its UUID; a tag; a class. Else empty.
    """

    kind: Kind
    value: str = ""

    def __str__(self) -> str:
        return self.kind.value + self.value

    @classmethod
    def parse(
        cls, word: str, allowed: Collection[Kind], *, strict: bool = True
    ) -> Token:
        """Read a word.

        :param allowed: what may stand here.
        :param strict: whether a name has to be one that a VM, a tag or a class can
            have.  In files of Qubes OS any is good, and matches nothing.
        :raise QubesValueError: when it is no such word; the message says why.
        """
        token = cls._read(word)
        if token.kind not in allowed:
            raise QubesValueError(f"{word!r} cannot stand here")
        if strict and (reason := token.doubt):
            raise QubesValueError(reason)
        return token

    @classmethod
    def _read(cls, word: str) -> Token:
        if word == "dom0":
            return cls(Kind.ADMINVM)
        if not word.startswith("@") and word != "*":
            name = _read_vm(word)
            return cls(Kind.ADMINVM) if name == _UUID_OF_DOM0 else cls(Kind.NAME, name)
        for kind in _PREFIXED:
            if word.startswith(kind.value):
                value = word.removeprefix(kind.value)
                if not value or value.startswith("@"):
                    raise QubesValueError(
                        f"{word!r} lacks a valid name behind {kind.value}"
                    )
                return cls(kind, _read_vm(value) if kind in _NAMES_A_VM else value)
        try:
            return cls(Kind(word))
        except ValueError:
            raise QubesValueError(f"there is no keyword {word!r}") from None

    @property
    def doubt(self) -> str:
        """Why nothing can have this name; empty if something can."""
        if not self.value or self._names_by_uuid or _NAME.fullmatch(self.value):
            return ""
        if self.kind not in _NAMES_A_VM:
            return f"{str(self)!r} lacks a valid name behind {self.kind.value}"
        if self.kind is Kind.NAME and self.value.startswith("$"):
            return f"keywords begin with @, unlike {self.value!r}"
        return f"{self.value!r} is no name of a VM"

    @property
    def _names_by_uuid(self) -> bool:
        digits = self.value.removeprefix(_UUID_PREFIX)
        named = self.kind in _NAMES_A_VM and digits != self.value
        return named and _UUID.fullmatch(digits) is not None

    def names(self, vm: BaseVM) -> bool:
        """Tell whether its value is the VM's name, or its UUID."""
        return self.value in (vm.name, f"{_UUID_PREFIX}{vm.uuid}")

    @property
    def key(self) -> str | uuid.UUID:
        """What an app finds the VM by that it names."""
        return uuid.UUID(self.value) if self._names_by_uuid else self.value


def _read_vm(word: str) -> str:
    if not word:
        raise QubesValueError("a name of a VM is missing")
    digits = word.removeprefix(_UUID_PREFIX)
    return word.lower() if digits != word and _UUID.fullmatch(digits) else word


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
    :param redirect: what answers in place of the target (``target=``).
    :param default_target: the target that the question proposes.
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
        :raise PolicySyntaxError: when it is not valid; the message says why.
        """
        words = line.split()
        if len(words) < _FIELDS:
            reason = "expected SERVICE ARGUMENT SOURCE TARGET ACTION"
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
        verb = _parse_action(action)
        given: dict[str, str] = {}
        for word in parameters:
            name, equals, value = word.partition("=")
            if not equals or name not in _TAKES[verb]:
                raise QubesValueError(f"{verb} takes no parameter {word!r}")
            if name in given:
                raise QubesValueError(f"parameter {name!r} is given twice")
            given[name] = value
        user = given.get("user")
        if strict and user is not None and not _USER.fullmatch(user):
            raise QubesValueError(f"{user!r} is no name of a user")
        rule = cls(
            service,
            argument,
            Token.parse(source, SOURCE, strict=strict),
            Token.parse(target, TARGET, strict=strict),
            verb,
            redirect=_parse_redirect(given.get("target"), strict=strict),
            default_target=_parse_redirect(given.get("default_target"), strict=strict),
            user=user or None,
            notify=_parse_choice("notify", given),
            autostart=_parse_choice("autostart", given) is not False,
            origin=origin,
        )
        if (rule.target.kind, rule.action, rule.redirect) == _LEADS_NOWHERE:
            raise QubesValueError("allow for @default needs target=")
        return rule

    def __str__(self) -> str:
        words = [self.service, self.argument, self.source, self.target, self.action]
        parameters = {
            "target": self.redirect,
            "default_target": self.default_target,
            "user": self.user,
            "notify": {True: "yes", False: "no", None: None}[self.notify],
            "autostart": None if self.autostart else "no",
        }
        given = (f"{k}={v}" for k, v in parameters.items() if v is not None)
        return " ".join([*map(str, words), *given])

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


def _parse_redirect(value: str | None, *, strict: bool) -> Token | None:
    return None if value is None else Token.parse(value, REDIRECT, strict=strict)


def _parse_choice(name: str, given: dict[str, str]) -> bool | None:
    value = given.get(name)
    if value not in (None, "yes", "no"):
        raise QubesValueError(f"{name} is yes or no, not {value!r}")
    return None if value is None else value == "yes"
