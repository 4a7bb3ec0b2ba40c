"""Traces: what each VM uses over time, generated from a seed or from a timeline."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qubes_itests.qmemman.sizes import MIB

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from qubes_itests.qmemman.timeline import Record

__all__ = ["Change", "Trace", "generate", "recorded"]

#: (second, index of the VM, bytes that it uses from then on)
Change = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Trace:
    """What VMs use.

    :param maxima: of each VM, bytes.
    :param changes: in order of time.
    :param seconds: how long it takes.
    """

    maxima: Sequence[int]
    changes: Sequence[Change]
    seconds: int


def generate(count: int, seconds: int, seed: int) -> Trace:
    """Return VMs that idle, drift, and now and then work hard for some minutes.

    :param count: how many VMs.
    :param seconds: how long.
    :param seed: the same seed gives the same trace.
    """
    chance = random.Random(seed)  # noqa: S311 - repeatable, not secret
    maxima = [chance.choice((400, 1000, 2000, 4000)) * MIB for _ in range(count)]
    changes = [
        change
        for index, maximum in enumerate(maxima)
        for change in _life(chance, index, maximum, seconds)
    ]
    return Trace(maxima, sorted(changes), seconds)


def _life(
    chance: random.Random, index: int, maximum: int, seconds: int
) -> Iterator[Change]:
    idle = int(maximum * chance.uniform(0.1, 0.3))
    now = 0
    while now < seconds:
        yield now, index, int(idle * chance.uniform(0.9, 1.1))
        now += int(chance.expovariate(1 / 600)) + 1
        if now < seconds:
            yield now, index, int(maximum * chance.uniform(0.3, 0.7))
        now += int(chance.expovariate(1 / 120)) + 1


def recorded(records: Sequence[Record]) -> Trace:
    """Return what the VMs of a timeline used; dom0 is left out.

    :param records: in order of time, at least one.
    """
    start = records[0].time
    indices: dict[str, int] = {}
    maxima: list[int] = []
    used: dict[int, int] = {}
    changes = []
    for record in records:
        for domid, domain in record.domains.items():
            if domid == "0" or domain.used is None:
                continue
            index = indices.setdefault(domid, len(indices))
            if index == len(maxima):
                maxima.append(domain.maximum)
            if used.get(index) != domain.used:
                used[index] = domain.used
                changes.append((int(record.time - start), index, domain.used))
    return Trace(maxima, changes, int(records[-1].time - start) + 1)
