"""The result of a preparation, handed to the run in an environment variable."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping, Sequence

__all__ = ["Prepared"]

_VARIABLE = "QUBES_ITESTS_PREPARED"
#: Characters of one text.  A variable has 128 KiB at most (MAX_ARG_STRLEN), above which
#: no program starts any more, and the end of an error says more than its beginning.
_TEXT_LIMIT = 8000


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a run finds.

    :param entries: names of the entry points of tests that make up the run, each with
        the templates that it runs on; None for all that are installed, on all.
    :param apps: for each app whose tests cannot be run, why.
    :param templates: for each template that could not be built, why.
    :param timeouts: for those of these entry points whose apps say it, the seconds that
        each of their tests may take.
    :param words: of the command line, without which the run cannot be repeated.
    :param known_issues: files of apps that have them.
    :param complaints: for entry points whose apps say them, the settings ``fail_on``
        and ``allow_line``.
    :param core: where the core under test is imported from; empty for our own core.
    :param core_suites: the checkout whose integration suites run on our own core.
    :param copies: where apps are installed, each with the directory of the app.
    """

    entries: Mapping[str, tuple[str, ...]] | None = None
    apps: Mapping[str, str] = field(default_factory=dict)
    templates: Mapping[str, str] = field(default_factory=dict)
    timeouts: Mapping[str, float] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    known_issues: tuple[str, ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)
    complaints: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    core: str = ""
    core_suites: str = ""

    @classmethod
    def told(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """Return what was told; nothing special without the variable."""
        values = json.loads(environment.get(_VARIABLE) or "{}")
        entries = values.get("entries")
        return cls(
            entries and {name: tuple(names) for name, names in entries.items()},
            values.get("apps", {}),
            values.get("templates", {}),
            values.get("timeouts", {}),
            tuple(values.get("words", ())),
            tuple(values.get("known_issues", ())),
            values.get("copies", {}),
            values.get("complaints", {}),
            values.get("core", ""),
            values.get("core_suites", ""),
        )

    def tell(self, environment: MutableMapping[str, str] = os.environ) -> None:
        """Have the processes that follow find it."""
        values = dataclasses.asdict(self)
        for kind in ("apps", "templates"):
            texts = values[kind].items()
            values[kind] = {name: text[-_TEXT_LIMIT:] for name, text in texts}
        environment[_VARIABLE] = json.dumps(values)
