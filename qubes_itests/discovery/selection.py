"""The selection of plugins and templates that a run is about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["EXCLUDE", "INCLUDE", "TEMPLATES", "Selection"]

#: Environment variables: words separated by white space.
INCLUDE: Final = "QUBES_TEST_EXTRA_INCLUDE"
EXCLUDE: Final = "QUBES_TEST_EXTRA_EXCLUDE"
TEMPLATES: Final = "QUBES_TEST_TEMPLATES"


@dataclass(frozen=True, slots=True)
class Selection:
    """Which plugins and templates a run is about.

    :param templates: names of templates, in the order of the run.
    :param include: names of entry points to take, None for all.
    :param exclude: names of entry points to leave out; stronger than `include`.
    """

    templates: tuple[str, ...]
    include: frozenset[str] | None = None
    exclude: frozenset[str] = frozenset()

    @classmethod
    def from_environment(
        cls, environment: Mapping[str, str], templates: Sequence[str]
    ) -> Self:
        """Read the environment variables that Qubes OS has for this.

        A variable that is empty counts as not set.

        :param environment: as `os.environ`.
        :param templates: for when the environment names none.
        """
        include = environment.get(INCLUDE, "").split()
        chosen = environment.get(TEMPLATES, "").split() or templates
        return cls(
            templates=tuple(dict.fromkeys(chosen)),
            include=frozenset(include) if include else None,
            exclude=frozenset(environment.get(EXCLUDE, "").split()),
        )

    def takes(self, name: str) -> bool:
        """Return whether an entry point of that name is part of the run."""
        if name in self.exclude:
            return False
        return self.include is None or name in self.include
