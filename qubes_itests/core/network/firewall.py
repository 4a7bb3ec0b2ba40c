"""A VM's firewall rules, as they are written; a net VM enforces them in Qubes OS."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import time
from typing import TYPE_CHECKING, ClassVar, Final, Self

from qubes_itests.core.exc import QubesValueError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from qubes_itests.core.vm.base import BaseVM

__all__ = ["Firewall", "FirewallRuleError", "Rule", "parse_rule"]

_HOST: Final = re.compile(r"[a-z0-9_][a-z0-9._-]{0,252}")
_PORTS: Final = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")
_DIGITS: Final = re.compile(r"[0-9]{1,12}")
_COMMENT: Final = re.compile(r"[A-Za-z0-9:;,./_\[\] -]{0,256}")
_HIGHEST_PORT: Final = 65535
_HIGHEST_ICMP_TYPE: Final = 255


class FirewallRuleError(QubesValueError):
    """A rule cannot be.

    :param rule: the rule.
    :param reason: what is wrong with it.
    """

    def __init__(self, rule: str, reason: str) -> None:
        super().__init__(f"firewall rule {rule!r}: {reason}")
        self.rule = rule
        self.reason = reason


def _choice(*known: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in known:
            raise ValueError(f"expected {' or '.join(known)}")
        return text

    return parse


def _network(text: str, version: int | None = None) -> str:
    found = ipaddress.ip_network(text, strict=False)
    if version not in (None, found.version):
        raise ValueError(f"expected a network of IPv{version}")
    # as given: an address within a network names that host to people
    return text if "/" in text else f"{text}/{found.prefixlen}"


def _host(text: str) -> str:
    if not _HOST.fullmatch(text):
        raise ValueError("expected a host's name")
    return text


def _ports(text: str) -> str:
    match = _PORTS.fullmatch(text)
    if match is None:
        raise ValueError("expected PORT or PORT-PORT")
    first, last = int(match[1]), int(match[2] or match[1])
    if not first <= last <= _HIGHEST_PORT:
        raise ValueError(f"expected ports up to {_HIGHEST_PORT}, the lower first")
    return f"{first}-{last}"


def _icmp_type(text: str) -> str:
    if not _DIGITS.fullmatch(text) or int(text) > _HIGHEST_ICMP_TYPE:
        raise ValueError(f"expected a number up to {_HIGHEST_ICMP_TYPE}")
    return str(int(text))


def _seconds(text: str) -> str:
    if not _DIGITS.fullmatch(text):
        raise ValueError("expected seconds since the epoch")
    return str(int(text))


def _comment(text: str) -> str:
    if not _COMMENT.fullmatch(text):
        raise ValueError("expected letters, digits, spaces and :;,./-_[]")
    return text


#: What each word of a rule takes, in the order in which rules are written.
_WORDS: Final[dict[str, Callable[[str], str]]] = {
    "action": _choice("accept", "drop", "forward"),
    "forwardtype": _choice("external", "internal"),
    "proto": _choice("tcp", "udp", "icmp"),
    "dst4": lambda text: _network(text, 4),
    "dst6": lambda text: _network(text, 6),
    "dsthost": _host,
    "src4": lambda text: _network(text, 4),
    "src6": lambda text: _network(text, 6),
    "srchost": _host,
    "dstports": _ports,
    "srcports": _ports,
    "icmptype": _icmp_type,
    "specialtarget": _choice("dns"),
    "expire": _seconds,
    "comment": _comment,
}
_ONE_OF: Final = ({"dst4", "dst6", "dsthost"}, {"src4", "src6", "srchost"})


def parse_rule(text: str) -> str:
    """Return a rule in its canonical form, ``action=accept proto=tcp …``.

    :raise FirewallRuleError: when it is none.
    """
    words = _split(text)
    parsed: dict[str, str] = {}
    for key, value in words.items():
        try:
            parsed[key] = _WORDS[key](value)
        except ValueError as error:
            raise FirewallRuleError(text, f"{key}={value}: {error}") from None
    if "action" not in parsed:
        raise FirewallRuleError(text, "it has no action=")
    protocol = parsed.get("proto")
    if {"dstports", "srcports"} & set(parsed) and protocol not in ("tcp", "udp"):
        raise FirewallRuleError(text, "ports need proto=tcp or proto=udp")
    if "icmptype" in parsed and protocol != "icmp":
        raise FirewallRuleError(text, "icmptype needs proto=icmp")
    if any(len(group & set(parsed)) > 1 for group in _ONE_OF):
        raise FirewallRuleError(text, "it has two hosts on one side")
    return " ".join(f"{key}={parsed[key]}" for key in _WORDS if key in parsed)


def _split(text: str) -> dict[str, str]:
    # only a comment may have spaces, and nothing follows it
    options, found, comment = text.partition("comment=")
    words: dict[str, str] = {}
    for option in options.split():
        key, equals, value = option.partition("=")
        if key in ("dsthost", "srchost"):
            with contextlib.suppress(ValueError):  # it is a name
                version = ipaddress.ip_network(value, strict=False).version
                key = f"{key[:3]}{version}"
        if not equals or key not in _WORDS:
            raise FirewallRuleError(text, f"there is no {option!r} in a rule")
        if key in words:
            raise FirewallRuleError(text, f"{key} is given twice")
        words[key] = value
    if found:
        words["comment"] = comment
    return words


def _part(*keys: str) -> property:
    def find(rule: Rule) -> str | None:
        options, _, comment = rule.partition(" comment=")
        words = dict(option.split("=", 1) for option in options.split())
        if comment:
            words["comment"] = comment
        return next((words[key] for key in keys if key in words), None)

    return property(find)


class Rule(str):
    """A rule in its canonical form; its parts are attributes, None where it has none.

    :param xml: None.
    :param parts: by name; `dsthost` is an address, a network, or a name.
    :raise FirewallRuleError: when it is none.
    """

    __slots__ = ()

    action = _part("action")
    proto = _part("proto")
    dsthost = _part("dst4", "dst6", "dsthost")
    dstports = _part("dstports")
    icmptype = _part("icmptype")
    specialtarget = _part("specialtarget")
    expire = _part("expire")
    comment = _part("comment")

    def __new__(cls, xml: None = None, **parts: object) -> Self:
        """Put it together from its parts."""
        del xml
        given = {key: str(part) for key, part in parts.items() if part is not None}
        # a comment goes behind all others, and is the only one that may have spaces
        given["comment"] = given.pop("comment", "")
        text = " ".join(f"{key}={part}" for key, part in given.items() if part)
        for key, part in given.items():
            if key != "comment" and len(part.split()) != 1:
                raise FirewallRuleError(text, f"{key}={part!r} is not one word")
        return cls.from_api_string(text)

    @classmethod
    def from_api_string(cls, untrusted_rule: str) -> Self:
        """Return the rule that a text is, as the Admin API has it."""
        return str.__new__(cls, parse_rule(untrusted_rule))

    @property
    def api_rule(self) -> str | None:
        """The text for the Admin API; None when it has expired."""
        return None if _is_expired(self, time.time()) else str(self)

    @property
    def rule(self) -> str | None:
        """The text for who enforces it, which has neither end nor comment."""
        options = (self.api_rule or "").partition(" comment=")[0]
        return re.sub(r" expire=\d+", "", options) or None


def _is_expired(rule: str, now: float) -> bool:
    # a comment has no =
    end = re.search(r" expire=(\d+)", rule)
    return end is not None and int(end[1]) <= now


class Firewall:
    """The rules of one VM; what none of them matches is dropped.

    :param vm: whose rules they are.
    """

    #: What there is as long as nobody sets others.
    DEFAULT: ClassVar = (Rule(action="accept"),)
    #: What becomes of what no rule matches.
    policy: Final = "drop"

    def __init__(self, vm: BaseVM) -> None:
        self._vm = vm
        self._rules: list[str] = list(self.DEFAULT)

    @property
    def rules(self) -> list[str]:
        """The rules, in order, in their canonical form; those that expired are gone.

        :raise FirewallRuleError: when the list was given what is none.
        """
        now = time.time()
        rules = [rule for rule in self._rules if not _is_expired(rule, now)]
        self._rules[:] = map(_rule, rules)
        return self._rules

    @rules.setter
    def rules(self, rules: Iterable[str]) -> None:
        self._rules = [_rule(rule) for rule in rules]

    def load_defaults(self) -> None:
        """Allow everything."""
        self.rules = self.DEFAULT

    def clone(self, other: Firewall) -> None:
        """Have the rules of another VM."""
        self.rules = other.rules

    def save(self) -> None:
        """Save the app, and tell what enforces the rules: ``firewall-changed``."""
        self._vm.app.save()
        self._vm.fire_event("firewall-changed")


def _rule(rule: str) -> Rule:
    return rule if isinstance(rule, Rule) else Rule.from_api_string(rule)
