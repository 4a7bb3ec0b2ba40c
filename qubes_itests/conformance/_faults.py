"""Tests of power cuts and full disks: what is promised holds, the rest is as before."""

from __future__ import annotations

import contextlib
import itertools
from typing import TYPE_CHECKING, Final

import pytest

from qubes_itests.conformance import _steps
from qubes_itests.conformance._steps import STEPS, Life, Step, possible, states_after
from qubes_itests.conformance.features import feature
from qubes_itests.faultdisk import failing_call
from qubes_storage import StoragePoolException

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from qubes_itests.conformance._steps import State
    from qubes_itests.faultdisk import Crash, FaultFilesystem
    from qubes_itests.fixtures.faultdisk import FaultDisks
    from qubes_storage import Pool

__all__ = ["FaultTests", "Opener"]

#: System calls of one operation; none has as many.
_MOST_CALLS: Final = 200

#: What happens before, and the operation in which space runs out.
_FULL: Final[Mapping[str, tuple[str, str]]] = {
    "create": ("", "work create"),
    "start": ("work create", "work start"),
    "start a snapshot": ("template create start write stop", "snapshot start"),
    "stop": ("work create start write", "work stop"),
    "stop without snapshots": ("bare create start write", "bare stop"),
    "revert": ("work create start write stop", "work revert"),
    "enlarge": ("work create start write stop", "work enlarge"),
    "enlarge while it runs": ("work create start write", "work enlarge"),
    "import": ("work create start write stop", "work import_data"),
    "clone": ("template create start write stop\nwork create", "work import_template"),
}


class Opener:
    """Opens pools in directories, with the volumes of all steps.

    :param open_pool: makes an object of a pool in a directory.
    :param runner: runs the coroutines.
    :param lacks: features that the driver lacks.
    """

    def __init__(
        self,
        open_pool: Callable[[Path], Pool],
        runner: asyncio.Runner,
        lacks: frozenset[str],
    ) -> None:
        self._open_pool = open_pool
        self._runner = runner
        self.lacks = lacks

    def life(self, directory: Path) -> Life:
        """Return the volumes of the pool in a directory."""
        pool = self._open_pool(directory)
        self._runner.run(pool.setup())
        return Life(pool, self._runner, self.lacks)


class FaultTests:
    """What a power cut leaves, and what an operation leaves that lacks space."""

    #: How many power cuts a test looks at, unless the command line says otherwise.
    power_cuts = 50

    @feature("power_cuts")
    @pytest.mark.parametrize("others", ["alone", "others flush"])
    def test_power_cut_leaves_what_was_promised(
        self, filesystem: str, others: str, opener: Opener, faultdisk: FaultDisks
    ) -> None:
        """Each volume is as before or after the step, and can be used.

        Others that flush bring names to the disk before contents.
        """
        steps = [step for step in STEPS if step.volume != "bare"]
        self._cut_power(filesystem, steps, others, opener, faultdisk)

    @feature("no_snapshot_power_cuts")
    @pytest.mark.parametrize("others", ["alone", "others flush"])
    def test_power_cut_leaves_what_was_promised_without_snapshots(
        self, filesystem: str, others: str, opener: Opener, faultdisk: FaultDisks
    ) -> None:
        """The image that a VM writes to is the only one."""
        steps = [step for step in STEPS if step.volume == "bare"]
        self._cut_power(filesystem, steps, others, opener, faultdisk)

    def _cut_power(
        self,
        kind: str,
        steps: Sequence[Step],
        others: str,
        opener: Opener,
        faultdisk: FaultDisks,
    ) -> None:
        steps = possible(steps, opener.lacks)
        if not steps:
            pytest.skip("the driver has no such volumes")
        history = states_after(steps)

        def live(filesystem: FaultFilesystem) -> None:
            busy = others == "others flush"
            with filesystem.neighbour() if busy else contextlib.nullcontext():
                life = opener.life(filesystem.mount_point)
                for step in steps:
                    filesystem.disk.note("begun")
                    life.take(step)
                    filesystem.disk.note("done")
                life.close()

        def check(crash: Crash) -> None:
            if not crash.reached:
                return  # the pool may not be there yet
            number, is_half_done = divmod(len(crash.reached), 2)
            step = steps[number] if is_half_done else None
            before, after = history[number], history[number + is_half_done]
            _examine(opener, crash.directory, before, after, step)

        recording = faultdisk.record(kind, live)
        faultdisk.examine(recording, check, self.power_cuts)

    @feature("full_disk")
    @pytest.mark.parametrize("name", _FULL)
    def test_operation_without_space_fails_as_a_whole(
        self, filesystem: str, name: str, opener: Opener, request: pytest.FixtureRequest
    ) -> None:
        """At each of the system calls that it makes; then there is space again."""
        root = request.getfixturevalue(filesystem)
        first, last = map(_steps.parse, _FULL[name])
        step = Step(last[0].volume, last[0].action, len(first) + 1)
        steps = possible([*first, step], opener.lacks)
        if steps != [*first, step]:
            pytest.skip("the driver lacks what this needs")
        *_, before, after = states_after(steps)
        for nth in itertools.count(1):
            assert nth < _MOST_CALLS
            directory = root / str(nth)
            directory.mkdir()
            life = opener.life(directory)
            for one in first:
                life.take(one)
            error = None
            with failing_call(directory, nth) as fault:
                try:
                    life.take(step)
                except StoragePoolException as caught:
                    error = caught
            life.close()
            try:
                if error is None:
                    _examine(opener, directory, after, after, None)
                else:
                    _examine(opener, directory, before, after, step)
            except AssertionError as wrong:
                reason = f"no space for {fault.hit}, {error or 'no error'}: {wrong}"
                raise AssertionError(reason) from wrong
            if fault.hit is None:
                assert error is None
                break
        assert nth > 1, "nothing was tried"


def _examine(
    opener: Opener,
    directory: Path,
    before: Mapping[str, State],
    after: Mapping[str, State],
    step: Step | None,
) -> None:
    life = opener.life(directory)
    try:
        _steps.examine(life, before, after, step)
    finally:
        life.close()
