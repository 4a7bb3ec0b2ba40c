"""``clean``: the remains of killed runs, and the cache."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from qubes_itests.exc import HarnessError
from qubes_itests.exit_codes import ExitCode
from qubes_itests.host.cache import Cache
from qubes_itests.host.rundir import remove_stale, under_way

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qubes_itests.cli.arguments import Command
    from qubes_itests.host.cache import Entry
    from qubes_itests.run.settings import Settings

__all__ = ["execute"]

_OURS = ("directories", ".locks")


def execute(command: Command, _settings: Settings) -> int:
    """Remove them, say what was removed and how much, and what the cache holds."""
    cache = Cache()
    swept = cache.sweep()
    stale = remove_stale(cache)
    parts = _count(len(swept), "half-made entry", "half-made entries")
    size = _size([*stale.values(), *(entry.size for entry in swept)])
    runs = _count(len(stale), "stale run", "stale runs")
    print(f"Removed {runs} and {parts} from {cache.root}: {size}.")
    if command.cache and under_way(cache):
        raise HarnessError(
            f"A run uses the cache {cache.root}: wait for it to end, then clean again."
        )
    content = cache.content()
    kinds = ", ".join(_kinds(content))
    if not command.cache:
        total = _size(entry.size for entry in content)
        limit = _size([cache.limit])
        print(f"The cache holds {total} of {limit}: {kinds or 'it is empty'}.")
        return ExitCode.OK
    # Only what is known to be ours: somebody may name a directory by mistake.
    for name in {*cache.kinds, *_OURS}:
        shutil.rmtree(cache.root / name, ignore_errors=True)
    print(f"Removed the cache: {kinds or 'it was empty'}.")
    return ExitCode.OK


def _kinds(content: list[Entry]) -> Iterable[str]:
    for kind in sorted({entry.kind for entry in content}):
        yield f"{kind} {_size(e.size for e in content if e.kind == kind)}"


def _size(sizes: Iterable[int]) -> str:
    mib = sum(sizes) / (1 << 20)
    return f"{mib:.0f} MiB" if mib < 1 << 10 else f"{mib / (1 << 10):.1f} GiB"


def _count(number: int, one: str, more: str) -> str:
    return f"{number} {one if number == 1 else more}"
