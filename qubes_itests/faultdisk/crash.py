"""States of a disk after a power cut.

Everything before the last flush that came before the cut, and of what was written
since any part: each write wholly, not at all, or some of its sectors.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qubes_itests.faultdisk.operations import SECTOR, Kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from qubes_itests.faultdisk.operations import Operation

__all__ = ["CrashState", "Patch", "choose_states", "flushed_before", "survivors"]

#: Bytes that are on the disk at an offset.
Patch = tuple[int, bytes]

#: How likely a write that was not flushed is on the disk; one is drawn per state.
_CHANCES = (0.0, 0.1, 0.5, 0.9, 1.0)
_TORN = 0.25
_HALF = 0.5
#: Operations after a flush or a note that are near to it.
_NEAR = 4


@dataclass(frozen=True, order=True, slots=True)
class CrashState:
    """What one power cut leaves; the same numbers name the same state.

    :param cut: how many operations came before the power cut.
    :param seed: of the choice of what survives.
    :param index: of this state among those of the seed.
    """

    cut: int
    seed: int
    index: int

    def __str__(self) -> str:
        return f"seed {self.seed}, index {self.index}, cut {self.cut}"

    def random(self) -> random.Random:
        """Return the random numbers that choose what survives."""
        return random.Random(f"{self.seed}/{self.index}")  # noqa: S311 - no secret


def choose_states(
    operations: Sequence[Operation], seed: int, count: int
) -> list[CrashState]:
    """Return states of a disk, ordered by the time of the cut.

    Half of the cuts are anywhere, half soon after a flush or a note: there the next
    promise begins.

    :param operations: what was recorded.
    :param seed: another seed chooses other states.
    :param count: how many.
    """
    promises = [
        number
        for number, operation in enumerate(operations, 1)
        if operation.kind in {Kind.FLUSH, Kind.LIE, Kind.NOTE}
    ]

    def cut(index: int) -> int:
        numbers = random.Random(f"{seed}/{index}/cut")  # noqa: S311 - no secret
        if promises and numbers.random() < _HALF:
            near = numbers.choice(promises) + numbers.randrange(_NEAR)
            return min(len(operations), near)
        return numbers.randint(0, len(operations))

    return sorted(CrashState(cut(index), seed, index) for index in range(count))


def flushed_before(operations: Sequence[Operation], cut: int) -> int:
    """Return how many operations are certainly on the disk after a power cut.

    :param cut: how many came before it.
    """
    for number in range(cut, 0, -1):
        if operations[number - 1].kind is Kind.FLUSH:
            return number
    return 0


def survivors(
    operations: Sequence[Operation],
    state: CrashState,
    whole: Iterable[tuple[int, int]] = (),
) -> Iterator[Patch]:
    """Yield what, of the writes that were not flushed, is on the disk, in order.

    :param operations: what was recorded.
    :param state: of which power cut.
    :param whole: offsets and lengths of what the disk writes whole or not at all,
        besides each sector.
    """
    numbers = state.random()
    chance = numbers.choice(_CHANCES)
    # A filesystem's superblock may be larger than a sector, and without a copy.
    indivisible = list(whole)
    start = flushed_before(operations, state.cut)
    for operation in itertools.islice(operations, start, state.cut):
        if not operation.changes:
            continue
        divisible = chance not in (0, 1) and operation.length > SECTOR
        end = operation.offset + operation.length
        if (
            divisible
            and numbers.random() < _TORN
            and not any(
                operation.offset < begin + length and begin < end
                for begin, length in indivisible
            )
        ):
            yield from _tear(operation, numbers)
        elif numbers.random() < chance:
            yield operation.offset, operation.content


def _tear(operation: Operation, numbers: random.Random) -> Iterator[Patch]:
    content = operation.content
    starts = range(0, operation.length, SECTOR)
    if numbers.random() < _HALF:  # the disk got that far
        yield operation.offset, content[: numbers.choice(starts)]
        return
    for start in starts:
        if numbers.random() < _HALF:
            yield operation.offset + start, content[start : start + SECTOR]
