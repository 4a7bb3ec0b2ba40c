"""``clean``: what killed runs left, and the cache if asked."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from qubes_itests.exc import HarnessError
from qubes_itests.exit_codes import ExitCode
from qubes_itests.host.cache import Cache
from qubes_itests.host.rundir import remove_stale

if TYPE_CHECKING:
    from qubes_itests.cli.arguments import Command
    from qubes_itests.configuration import Settings

__all__ = ["execute"]

_OURS = ("directories", ".locks")


def execute(command: Command, _settings: Settings) -> int:
    """Remove them, and say what was removed."""
    cache = Cache()
    stale = remove_stale(cache)
    print(f"Removed {_count(len(stale), 'stale run')} from {cache.root}.")  # noqa: T201
    if command.cache:
        _clear(cache)
    return ExitCode.OK


def _clear(cache: Cache) -> None:
    runs = cache.root / "runs"
    if any(path.is_dir() for path in runs.iterdir()):
        raise HarnessError(
            f"A run uses the cache {cache.root}: wait for it to end, then clean again."
        )
    # Only what is known to be ours: somebody may name a directory by mistake.
    locks = cache.root / ".locks"
    kinds = {path.name.partition(".")[0] for path in locks.glob("*.*")}
    ours = [cache.root / name for name in sorted({*kinds, *_OURS})]
    removed = [path for path in ours if path.is_dir()]
    for path in removed:
        shutil.rmtree(path)
    names = ", ".join(path.name for path in removed) or "it was empty"
    print(f"Removed the cache: {names}.")  # noqa: T201


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
