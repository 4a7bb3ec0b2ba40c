"""The words of a policy that stand for VMs: names and keywords."""

from __future__ import annotations

import enum
import re
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from qubes_itests.core.exc import QubesValueError

if TYPE_CHECKING:
    from collections.abc import Collection

    from qubes_itests.core.vm.base import BaseVM

__all__ = ["REDIRECT", "REQUESTED", "SOURCE", "TARGET", "Kind", "Token"]

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_UUID: Final = re.compile(r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
_UUID_PREFIX: Final = "uuid:"
_UUID_OF_DOM0: Final = f"{_UUID_PREFIX}{uuid.UUID(int=0)}"


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
            return cls._read_name(word)
        for kind in _PREFIXED:
            if word.startswith(kind.value):
                return cls(kind, _read_value(kind, word))
        try:
            return cls(Kind(word))
        except ValueError:
            raise QubesValueError(f"there is no keyword {word!r}") from None

    @classmethod
    def _read_name(cls, word: str) -> Token:
        name = _read_vm(word)
        return cls(Kind.ADMINVM) if name == _UUID_OF_DOM0 else cls(Kind.NAME, name)

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


def _read_value(kind: Kind, word: str) -> str:
    value = word.removeprefix(kind.value)
    if not value or value.startswith("@"):
        raise QubesValueError(f"{word!r} lacks a valid name behind {kind.value}")
    return _read_vm(value) if kind in _NAMES_A_VM else value


def _read_vm(word: str) -> str:
    if not word:
        raise QubesValueError("a name of a VM is missing")
    digits = word.removeprefix(_UUID_PREFIX)
    return word.lower() if digits != word and _UUID.fullmatch(digits) else word
