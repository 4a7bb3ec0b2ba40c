"""The files of a policy: read, and read again when they change."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from qubes_itests.core.policy.policy_errors import PolicyError
from qubes_itests.core.policy.reader import Reader, Stamp, stamp_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from qubes_itests.core.policy.rule import Rule

__all__ = ["Loaded", "PolicyFiles"]

log = logging.getLogger("qubes.policy")

#: What changed so shortly before it was read may change again without a trace in its
#: times: the clock of file systems ticks in up to 10 ms.
_CLOCK_TICK_NS: Final = 20_000_000


@dataclass(frozen=True, slots=True)
class Loaded:
    """What the files said when they were read.

    :param rules: theirs, in order; none if there is an error.
    :param error: what is wrong with them, None if nothing is.
    :param stamps: by which a change of what was read is seen.
    :param settled: whether every later change will be seen so.
    """

    rules: tuple[Rule, ...] = ()
    error: PolicyError | None = None
    stamps: Mapping[Path, Stamp | None] = field(default_factory=dict)
    settled: bool = False

    def is_current(self) -> bool:
        """Tell whether nothing has changed."""
        return self.settled and all(
            stamp_of(path) == stamp for path, stamp in self.stamps.items()
        )


class PolicyFiles:
    """The files of one directory, and what they include.

    :param directory: of files ``*.policy``; None, or one that is not there: no rules.
    :param legacy: what ``!compat-4.0`` reads; by default ``policy`` beside `directory`.
    """

    def __init__(self, directory: Path | None, legacy: Path | None = None) -> None:
        self._directory = directory
        self._legacy = legacy
        self.loaded = Loaded()

    def refresh(self) -> None:
        """Read them again if one of them has changed."""
        if self._directory is None or self.loaded.is_current():
            return
        before, self.loaded = self.loaded, self._load(self._directory)
        _tell(before, self.loaded)

    def _load(self, directory: Path) -> Loaded:
        began = time.time_ns()
        reader = Reader(directory, self._legacy or directory.with_name("policy"))
        error: PolicyError | None = None
        try:
            reader.read()
        except PolicyError as caught:
            error = caught
        # as in Qubes OS: what the rest says in truth, nobody knows
        rules = () if error is not None else tuple(reader.rules)
        newest = max((s.changed for s in reader.stamps.values() if s), default=0)
        return Loaded(rules, error, reader.stamps, newest < began - _CLOCK_TICK_NS)


def _tell(before: Loaded, now: Loaded) -> None:
    if now.error is not None:
        if str(now.error) != str(before.error):
            log.error("the policy denies all that it is asked: %s", str(now.error))
    elif before.error is not None or before.rules != now.rules:
        log.info("the policy's files have %d rules", len(now.rules))
