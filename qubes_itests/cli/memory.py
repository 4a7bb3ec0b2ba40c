"""``memory``: who holds the memory, live on the terminal or as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from qubes_itests.exc import HarnessError
from qubes_itests.exit_codes import ExitCode
from qubes_itests.host.cache import Cache
from qubes_itests.qmemman import live, plot, timeline

if TYPE_CHECKING:
    from qubes_itests.cli.arguments import Command
    from qubes_itests.configuration import Settings

__all__ = ["execute"]

_NAME = "memory.jsonl"


def execute(command: Command, _settings: Settings) -> int:
    """Show it or plot it."""
    words = list(command.words)
    plotting = words[:1] == ["plot"]
    files = words[1:] if plotting else words
    if len(files) > 1:
        raise HarnessError(f"One timeline at a time, not {len(files)}.")
    path = Path(files[0]) if files else _newest(Cache().root / "runs")
    if plotting:
        _plot(path, Path(command.output or path.with_suffix(".svg").name))
    else:
        live.follow(path, Console())
    return ExitCode.OK


def _newest(runs: Path) -> Path:
    found = sorted(runs.rglob(_NAME), key=lambda path: path.stat().st_mtime)
    if not found:
        raise HarnessError(f"No run under {runs} balances memory now: name a timeline.")
    return found[-1]


def _plot(source: Path, target: Path) -> None:
    picture = plot.draw(timeline.read(source))
    try:
        target.write_text(picture, encoding="utf-8")
    except OSError as error:
        raise HarnessError(f"The picture cannot be written: {error}.") from error
    print(f"Wrote {target}.")  # noqa: T201
