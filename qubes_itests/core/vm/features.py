"""Features and tags of a VM: free-form settings that extensions and guests read."""

from __future__ import annotations

import enum
import itertools
import re
from collections.abc import Iterable, Iterator, MutableMapping, MutableSet
from typing import TYPE_CHECKING, Any, Final, TypeVar

from qubes_itests.core.exc import (
    QubesFeatureNotFoundError,
    QubesTagNotFoundError,
    QubesValueError,
)
from qubes_itests.core.network.addresses import upstream
from qubes_itests.core.store.document import check_text

if TYPE_CHECKING:
    from qubes_itests.core.vm.base import BaseVM

__all__ = ["Features", "Tags"]

_T = TypeVar("_T")

_TAG: Final = re.compile(r"[A-Za-z0-9_-]+")
_FEATURE: Final = re.compile(r"[A-Za-z0-9_.-]+")


class _Mark(enum.Enum):
    MISSING = enum.auto()


_MISSING: Final = _Mark.MISSING


class Features(MutableMapping[str, str]):
    """The features of a VM: names and string values.

    True is stored as ``"1"``, False and None as ``""``; anything else as its string, so
    that 0 is ``"0"``, which counts as true.
    Each change fires ``domain-feature-pre-set:NAME`` and ``domain-feature-set:NAME``,
    or ``domain-feature-pre-delete:NAME`` and ``domain-feature-delete:NAME``.
    """

    def __init__(self, vm: BaseVM, values: Iterable[tuple[str, str]] = ()) -> None:
        self._vm = vm
        self._values = dict(values)

    def __getitem__(self, name: str) -> str:
        try:
            return self._values[name]
        except KeyError:
            raise QubesFeatureNotFoundError(self._vm, name) from None

    def __setitem__(self, name: str, value: Any) -> None:
        if not isinstance(name, str) or not _FEATURE.fullmatch(name):
            raise QubesValueError(
                f"{name!r} is no name of a feature: expected letters, digits, . _ -"
            )
        value = self._as_text(name, value)
        kwargs = {"feature": name, "value": value}
        if name in self._values:
            kwargs["oldvalue"] = self._values[name]
        self._vm.fire_event(f"domain-feature-pre-set:{name}", pre_event=True, **kwargs)
        self._values[name] = value
        self._vm.fire_event(f"domain-feature-set:{name}", **kwargs)

    def _as_text(self, name: str, value: object) -> str:
        if value is None or isinstance(value, bool):
            return "1" if value else ""
        try:
            return check_text(str(value))
        except ValueError as error:
            raise QubesValueError(
                f"feature {name!r} of {self._vm} cannot be {value!r}: {error}"
            ) from None

    def __delitem__(self, name: str) -> None:
        if name not in self._values:
            raise QubesFeatureNotFoundError(self._vm, name)
        self._vm.fire_event(
            f"domain-feature-pre-delete:{name}", pre_event=True, feature=name
        )
        del self._values[name]
        self._vm.fire_event(f"domain-feature-delete:{name}", feature=name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Features({self._values!r})"

    def check_with_template(
        self, name: str, default: _T | _Mark = _MISSING
    ) -> str | _T:
        """Return the feature, or else its template's.

        :param default: returned when neither has it.
        :raise QubesFeatureNotFoundError: without a default.
        """
        return self._check(name, default, _with_templates(self._vm))

    def check_with_netvm(self, name: str, default: _T | _Mark = _MISSING) -> str | _T:
        """Return the feature, or else that of its net VM, or of the net VM's, and on.

        See `check_with_template`.
        """
        return self._check(name, default, (self._vm, *upstream(self._vm)))

    def check_with_adminvm(self, name: str, default: _T | _Mark = _MISSING) -> str | _T:
        """Return the feature, or else that of dom0; see `check_with_template`."""
        return self._check(name, default, (self._vm, self._vm.app.domains["dom0"]))

    def check_with_template_and_adminvm(
        self, name: str, default: _T | _Mark = _MISSING
    ) -> str | _T:
        """Return the feature, or else its template's, or else that of dom0.

        See `check_with_template`.
        """
        holders = (*_with_templates(self._vm), self._vm.app.domains["dom0"])
        return self._check(name, default, holders)

    def _check(
        self, name: str, default: _T | _Mark, holders: Iterable[BaseVM]
    ) -> str | _T:
        for vm in holders:
            if name in vm.features:
                return vm.features[name]
        if isinstance(default, _Mark):
            raise QubesFeatureNotFoundError(self._vm, name)
        return default


def _with_templates(vm: BaseVM) -> Iterator[BaseVM]:
    """Yield a VM, its template, and the template's."""
    above: BaseVM | None = vm
    while above is not None:
        yield above
        above = above.template_or_none


class Tags(MutableSet[str]):
    """The tags of a VM.

    Each change fires ``domain-tag-add:NAME`` or ``domain-tag-delete:NAME``.
    """

    def __init__(self, vm: BaseVM, values: Iterable[str] = ()) -> None:
        self._vm = vm
        self._values = set(values)

    def __contains__(self, tag: object) -> bool:
        return tag in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._values))

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Tags({sorted(self._values)!r})"

    def add(self, value: str) -> None:
        """Add a tag; nothing happens if it is there."""
        if not isinstance(value, str) or not _TAG.fullmatch(value):
            raise QubesValueError(
                f"{value!r} is no tag: expected letters, digits, _ and -"
            )
        if value not in self._values:
            self._values.add(value)
            self._vm.fire_event(f"domain-tag-add:{value}", tag=value)

    def discard(self, value: str) -> None:
        """Remove a tag; nothing happens if it is not there."""
        if value in self._values:
            self._values.discard(value)
            self._vm.fire_event(f"domain-tag-delete:{value}", tag=value)

    def remove(self, value: str) -> None:
        """Remove a tag; KeyError if it is not there."""
        if value not in self._values:
            raise QubesTagNotFoundError(self._vm, value)
        self.discard(value)

    def update(self, *others: Iterable[str]) -> None:
        """Add the tags of any number of collections."""
        for tag in itertools.chain(*others):
            self.add(tag)

    @classmethod
    def _from_iterable(cls, it: Iterable[_T]) -> set[_T]:
        # what `&`, `|`, `-` and `^` give is nobody's
        return set(it)
