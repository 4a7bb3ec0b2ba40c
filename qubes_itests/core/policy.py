"""qrexec policy: which VM may call which service where.

Rules have the form of the files in ``/etc/qubes/policy.d``: ``SERVICE ARGUMENT SOURCE
TARGET ACTION [PARAMETER=VALUE …]``.  The first rule that matches decides; none denies.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from qubes_itests.core.exc import QubesValueError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qubes_itests.core.app import Qubes
    from qubes_itests.core.vm.base import BaseVM

__all__ = ["Decision", "Policy", "PolicySyntaxError", "Rule"]

log = logging.getLogger("qubes.policy")

_ACTIONS: Final = ("allow", "deny", "ask")
_PARAMETERS: Final = {
    "allow": {"target", "user", "notify", "autostart"},
    "deny": {"notify"},
    "ask": {"target", "user", "notify", "autostart", "default_target"},
}
_KEYWORDS: Final = {"@anyvm", "@default", "@dispvm", "@adminvm"}
_PREFIXES: Final = ("@tag:", "@type:", "@dispvm:")
_FIELDS: Final = 5


class PolicySyntaxError(QubesValueError):
    """A line of a policy cannot be understood.

    :param line: the line.
    :param reason: what is wrong with it.
    """

    def __init__(self, line: str, reason: str) -> None:
        super().__init__(f"policy line {line!r}: {reason}")
        self.line = line
        self.reason = reason


def _check_token(line: str, word: str) -> str:
    word = "@" + word[1:] if word.startswith("$") else word
    known = not word.startswith("@") or word in _KEYWORDS
    if not known and not word.startswith(_PREFIXES):
        raise PolicySyntaxError(line, f"there is no keyword {word!r}")
    return "@adminvm" if word == "dom0" else word


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of a policy.

    :param service: name of the service, or ``*``.
    :param argument: ``*``, ``+`` for none, or ``+ARGUMENT``.
    :param source: a VM's name or a keyword.
    :param target: what the caller asked for: a VM's name or a keyword.
    :param action: ``allow``, ``deny`` or ``ask``.
    :param parameters: such as ``target=`` and ``user=``.
    """

    service: str
    argument: str
    source: str
    target: str
    action: str
    parameters: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, line: str) -> Rule:
        """Read one line; PolicySyntaxError says what is wrong with it."""
        words = line.split()
        if len(words) < _FIELDS:
            raise PolicySyntaxError(
                line, "it needs SERVICE ARGUMENT SOURCE TARGET ACTION"
            )
        service, argument, source, target, action = words[:_FIELDS]
        if argument != "*" and not argument.startswith("+"):
            raise PolicySyntaxError(line, "the argument is *, + or +ARGUMENT")
        if action not in _ACTIONS:
            raise PolicySyntaxError(line, f"the action is one of {', '.join(_ACTIONS)}")
        return cls(
            service,
            argument,
            _check_token(line, source),
            _check_token(line, target),
            action,
            cls._parse_parameters(line, action, words[_FIELDS:]),
        )

    @staticmethod
    def _parse_parameters(line: str, action: str, words: list[str]) -> dict[str, str]:
        parameters: dict[str, str] = {}
        for word in words:
            name, equals, value = word.partition("=")
            if not equals or name not in _PARAMETERS[action]:
                raise PolicySyntaxError(line, f"{action} takes no parameter {word!r}")
            if name in parameters:
                raise PolicySyntaxError(line, f"parameter {name!r} is given twice")
            parameters[name] = (
                _check_token(line, value) if name.endswith("target") else value
            )
        return parameters

    def __str__(self) -> str:
        words = [self.service, self.argument, self.source, self.target, self.action]
        return " ".join([*words, *(f"{k}={v}" for k, v in self.parameters.items())])

    def matches(self, service: str, source: BaseVM, target: str, app: Qubes) -> bool:
        """Tell whether the rule speaks of this call.

        :param service: ``SERVICE`` or ``SERVICE+ARGUMENT``.
        :param target: a VM's name, or ``@default``, ``@adminvm``, ``@dispvm[:NAME]``.
        """
        name, _, argument = service.partition("+")
        return (
            self.service in ("*", name)
            and self.argument in ("*", f"+{argument}")
            and _vm_matches(self.source, source)
            and _target_matches(self.target, target, app)
        )


def _vm_matches(word: str, vm: BaseVM) -> bool:
    if word == "@anyvm":
        return vm.klass != "AdminVM"
    if word == "@adminvm":
        return vm.klass == "AdminVM"
    if word.startswith("@tag:"):
        return word.removeprefix("@tag:") in vm.tags
    if word.startswith("@type:"):
        return word.removeprefix("@type:") == vm.klass
    return word == vm.name


def _target_matches(word: str, target: str, app: Qubes) -> bool:
    if target.startswith("@") and target != "@adminvm":
        # @anyvm does not speak of dom0, but of every other thing one may ask for
        if target.startswith("@dispvm") and word.startswith("@dispvm:@tag:"):
            return False
        return word in (target, "@anyvm")
    vm = app.domains["dom0" if target == "@adminvm" else target]
    return _vm_matches(word, vm)


@dataclass(frozen=True, slots=True)
class Decision:
    """What the policy says of one call.

    :param allowed: whether it may be made.
    :param target: the VM's name or ``@dispvm[:NAME]`` that answers it; empty if denied.
    :param user: the user it runs as, None for the default.
    :param rule: the rule that decided, None if no rule matched.
    :param reason: one sentence, for the log.
    """

    allowed: bool
    target: str
    user: str | None
    rule: Rule | None
    reason: str


class Policy:
    """The rules of an app, in the order in which they are asked."""

    def __init__(self, lines: Iterable[str] = ()) -> None:
        self.rules: list[Rule] = [Rule.parse(line) for line in lines]

    def add_rule(self, rule: Rule | str, *, first: bool = True) -> Rule:
        """Add a rule before (or behind) all others, and return it."""
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

    def evaluate(
        self, app: Qubes, service: str, source: BaseVM, target: str
    ) -> Decision:
        """Decide on a call.

        :param service: ``SERVICE`` or ``SERVICE+ARGUMENT``.
        :param source: the VM that calls.
        :param target: what it asked for; a VM that does not exist is ``@default``.
        """
        asked = self._normalise(app, target)
        rule = next(
            (r for r in self.rules if r.matches(service, source, asked, app)), None
        )
        decision = self._decide(app, rule, asked)
        # names, not VMs: who keeps records must not keep the VMs alive
        log.info(
            "%s: %s -> %s: %s (%s)",
            service,
            source.name,
            target,
            "allowed" if decision.allowed else "denied",
            decision.reason,
        )
        return decision

    @staticmethod
    def _normalise(app: Qubes, target: str) -> str:
        target = "@" + target[1:] if target.startswith("$") else target
        if target in ("dom0", "@adminvm"):
            return "@adminvm"
        if target.startswith("@dispvm") or (target in app.domains and target):
            return target
        return "@default"

    @staticmethod
    def _decide(app: Qubes, rule: Rule | None, asked: str) -> Decision:
        def deny(reason: str) -> Decision:
            return Decision(False, "", None, rule, reason)

        if rule is None:
            return deny("no rule of the policy matches")
        if rule.action == "deny":
            return deny(f"rule: {rule}")
        if rule.action == "ask":
            return deny(f"nobody is there to ask; rule: {rule}")
        target = rule.parameters.get("target", asked)
        if target == "@default":
            return deny(f"@default, and no target= in the rule: {rule}")
        known: Any = target.startswith("@") or target in app.domains
        if not known:
            return deny(f"there is no VM {target!r}; rule: {rule}")
        return Decision(
            True, target, rule.parameters.get("user"), rule, f"rule: {rule}"
        )
