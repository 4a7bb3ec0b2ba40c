"""A VM's firewall rules, as they are written; a net VM enforces them in Qubes OS."""

from __future__ import annotations

import ipaddress
import re
import time
from typing import TYPE_CHECKING, Final

from qubes_itests.core.exc import QubesValueError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["Firewall", "FirewallRuleError", "parse_rule"]

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
            raise ValueError(f"it takes {' or '.join(known)}")
        return text

    return parse


def _network(text: str, version: int | None = None) -> str:
    found = ipaddress.ip_network(text, strict=False)
    if version not in (None, found.version):
        raise ValueError(f"it takes a network of IPv{version}")
    # as given: an address within a network names that host to people
    return text if "/" in text else f"{text}/{found.prefixlen}"


def _host(text: str) -> str:
    if not _HOST.fullmatch(text):
        raise ValueError("it takes a host's name")
    return text


def _ports(text: str) -> str:
    match = _PORTS.fullmatch(text)
    if match is None:
        raise ValueError("it takes PORT or PORT-PORT")
    first, last = int(match[1]), int(match[2] or match[1])
    if not first <= last <= _HIGHEST_PORT:
        raise ValueError(f"it takes ports up to {_HIGHEST_PORT}, the lower first")
    return f"{first}-{last}"


def _icmp_type(text: str) -> str:
    if not _DIGITS.fullmatch(text) or int(text) > _HIGHEST_ICMP_TYPE:
        raise ValueError(f"it takes a number up to {_HIGHEST_ICMP_TYPE}")
    return str(int(text))


def _seconds(text: str) -> str:
    if not _DIGITS.fullmatch(text):
        raise ValueError("it takes seconds since the epoch")
    return str(int(text))


def _comment(text: str) -> str:
    if not _COMMENT.fullmatch(text):
        raise ValueError("it takes letters, digits, spaces and :;,./-_[]")
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
    _check_together(text, parsed)
    return " ".join(f"{key}={parsed[key]}" for key in _WORDS if key in parsed)


def _split(text: str) -> dict[str, str]:
    # only a comment may have spaces, and nothing follows it
    options, found, comment = text.partition("comment=")
    words: dict[str, str] = {}
    for option in options.split():
        key, equals, value = option.partition("=")
        if key in ("dsthost", "srchost"):
            key = _kind_of_host(key, value)
        if not equals or key not in _WORDS:
            raise FirewallRuleError(text, f"there is no {option!r} in a rule")
        if key in words:
            raise FirewallRuleError(text, f"{key} is given twice")
        words[key] = value
    if found:
        words["comment"] = comment
    return words


def _kind_of_host(key: str, value: str) -> str:
    try:
        return f"{key[:3]}{ipaddress.ip_network(value, strict=False).version}"
    except ValueError:
        return key


def _check_together(text: str, words: dict[str, str]) -> None:
    if "action" not in words:
        raise FirewallRuleError(text, "it has no action=")
    if {"dstports", "srcports"} & set(words) and words.get("proto") not in (
        "tcp",
        "udp",
    ):
        raise FirewallRuleError(text, "ports need proto=tcp or proto=udp")
    if "icmptype" in words and words.get("proto") != "icmp":
        raise FirewallRuleError(text, "icmptype needs proto=icmp")
    if any(len(group & set(words)) > 1 for group in _ONE_OF):
        raise FirewallRuleError(text, "it has two hosts on one side")


def _is_expired(rule: str, now: float) -> bool:
    # a comment has no =
    end = re.search(r" expire=(\d+)", rule)
    return end is not None and int(end[1]) <= now


class Firewall:
    """The rules of one VM; what none of them matches is dropped."""

    def __init__(self) -> None:
        self._rules = ["action=accept"]

    @property
    def rules(self) -> tuple[str, ...]:
        """The rules, in order, in their canonical form; those that expired are gone."""
        now = time.time()
        self._rules = [rule for rule in self._rules if not _is_expired(rule, now)]
        return tuple(self._rules)

    @rules.setter
    def rules(self, rules: Iterable[str]) -> None:
        self._rules = [parse_rule(rule) for rule in rules]
