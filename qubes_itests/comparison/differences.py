"""The differences between two descriptions of a core, or the outcomes of two runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Difference", "compare"]

_ERROR: Final = "!"
#: Outcomes of tests that failed, or could not be run.
_BAD: Final = ("failed", "error")


@dataclass(frozen=True, slots=True)
class Difference:
    """What one thing is here and there.

    :param kind: what it is the kind of: a name, a default, a test.
    :param name: which one.
    :param here: what it is here, None if there is none.
    :param there: the same of the other.
    """

    kind: str
    name: str
    here: str | None
    there: str | None

    @property
    def verdict(self) -> str:
        """Same, differs, only here, or only there."""
        if self.here is None:
            return "only there"
        if self.there is None:
            return "only here"
        return "same" if _fits(self.kind, self.here, self.there) else "differs"

    @property
    def failed_on_both(self) -> bool:
        """Whether it is a test that failed in the same way here and there."""
        bad = (self.here or "").startswith(_BAD)
        return self.kind == "test" and self.verdict == "same" and bad


def _fits(kind: str, here: str, there: str) -> bool:
    """Tell whether those who expect what is there find it here."""
    if kind == "test":
        # why it failed is in other words on another core
        return here.partition(":")[0] == there.partition(":")[0]
    if not (here.startswith(_ERROR) and there.startswith(_ERROR)):
        return here == there
    if kind == "error":
        return set(there.split()) <= set(here.split())
    # Both refuse. What is caught is the error of Qubes OS; a TypeError from somewhere
    # within is nothing to expect.
    caught = [name for name in there.split()[1:2] if name.startswith("Qubes")]
    return set(caught) <= set(here.split())


def compare(
    here: Mapping[str, str], there: Mapping[str, str]
) -> tuple[Difference, ...]:
    """Return all that is in either, in the order of its names.

    Of a class or a property that only one has, what is in it is left out.

    :param here: what there is, by a kind, a blank and a name.
    """
    both = here.keys() & there.keys()
    classes = {key.rpartition(".")[2] for key in both if key.startswith("name ")}
    found = []
    for key in sorted(here.keys() | there.keys()):
        kind, _, name = key.partition(" ")
        if kind == "set" and f"default {name.partition(' = ')[0]}" not in both:
            continue
        if kind == "member" and name.partition(".")[0] not in classes:
            continue
        found.append(Difference(kind, name, here.get(key), there.get(key)))
    return tuple(found)
