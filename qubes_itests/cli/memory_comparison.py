"""``memory compare``: scenarios under our qmemman and under that of a checkout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qubes_itests.dom0.memory_trials import Trial, try_core, try_ours
from qubes_itests.host.cache import Cache
from qubes_itests.host.rundir import RunDirectory
from qubes_itests.qmemman import plot
from qubes_itests.qmemman.simulation.scenarios import SCENARIOS
from qubes_itests.qmemman.sizes import MIB
from qubes_itests.run.preparation import prepare_listing
from qubes_itests.run.settings import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from qubes_itests.run.settings import Settings

__all__ = ["compare"]

#: What runs a scenario under each qmemman, by the title of its column.
_TRIED: Final = {"ours": try_ours, "core-admin": try_core}


def compare(settings: Settings, words: Sequence[str]) -> tuple[str, bool]:
    """Print what both make of scenarios.

    :param words: the names of scenarios; none for all.
    :return: a picture of it, and whether all came about that scenarios wait for.
    :raise ConfigurationError: there is no scenario of a name, or no checkout is named.
    """
    for word in words:
        if word not in SCENARIOS:
            expected = f"expected some of {', '.join(SCENARIOS)}; got {word!r}"
            raise ConfigurationError("memory compare", expected)
    if settings.core is None:
        problem = "expected the checkout of core-admin whose qmemman it is"
        raise ConfigurationError("--core", problem)
    prepare_listing(settings)
    rows, well = [], True
    with RunDirectory(Cache()) as run:
        for scenario in dict.fromkeys(words or SCENARIOS):
            trials = {
                title: attempt(SCENARIOS[scenario], _made(run.path / f"{n}" / scenario))
                for n, (title, attempt) in enumerate(_TRIED.items())
            }
            print("\n".join(_lines(scenario, trials)))
            rows.append([(f"{scenario}: {t}", trials[t].records) for t in trials])
            well &= all(trial.problem is None for trial in trials.values())
    return plot.draw_rows(rows), well


def _made(place: Path) -> Path:
    place.mkdir(parents=True)
    return place


def _lines(scenario: str, trials: dict[str, Trial]) -> Iterator[str]:
    """Yield a table of the targets in the end, and what did not come about."""
    yield f"{scenario:20}{''.join(f'{title:>20}' for title in trials)}"
    ends = [
        {
            d.name: d.target // MIB
            # none if its daemon has not come so far
            for record in trial.records[-1:]
            for d in record.domains.values()
        }
        for trial in trials.values()
    ]
    for name in dict.fromkeys(name for end in ends for name in end):
        cells = (f"{end[name]} MiB" if name in end else "-" for end in ends)
        yield f"  {name:18}{''.join(f'{cell:>20}' for cell in cells)}"
    for title, trial in trials.items():
        if trial.problem is not None:
            yield f"  {title}: {trial.problem}"
    yield ""
