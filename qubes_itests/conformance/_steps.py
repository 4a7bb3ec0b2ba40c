"""Steps in the life of volumes, what each leaves, and what is found of a half-done one.

What must be found follows from the steps alone, so nothing that a driver says of itself
is taken for granted.  Images are seen through the contract, and told apart by the
version that is written in each of their blocks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from qubes_itests.conformance.trial import KINDS, Owner
from qubes_storage import StoragePoolException

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from qubes_storage import Pool, Volume

__all__ = [
    "STEPS",
    "Life",
    "State",
    "Step",
    "examine",
    "parse",
    "possible",
    "states_after",
]

#: A sector: a power cut tears nothing smaller.
_BLOCK: Final = 512
_BLOCKS: Final = 64
_SIZE: Final = _BLOCK * _BLOCKS
_GARBAGE: Final = -1
_LAST: Final = 9999
#: Revisions that stay while those that were found are looked at.
_ROOM: Final = 16

#: The version of each block; 0 for zeros, _GARBAGE for what nobody has written.
Image = tuple[int, ...]

_EMPTY: Final[Image] = (0,) * _BLOCKS

#: The saved volumes: VM, name, revisions to keep.
_SAVED: Final = {
    "template": ("template", "root", 2),
    "work": ("work", "private", 1),
    "bare": ("bare", "private", -1),
    "none": ("none", "private", 0),
}


@dataclass(frozen=True)
class State:
    """What a saved volume holds.

    :param committed: its image; None if it has none.
    :param former: what was committed before, oldest first; more than is kept of it.
    :param dirty: what its VM has open; None if it is stopped.
    :param fresh: whether its VM has flushed nothing since the start.
    """

    committed: Image | None = None
    former: tuple[Image, ...] = ()
    dirty: Image | None = None
    fresh: bool = False


@dataclass(frozen=True)
class Step:
    """One operation on one volume.

    :param volume: one of `_SAVED`, or "snapshot", which is of the template.
    :param action: a method of `Life`.
    :param version: what is written in it.
    """

    volume: str
    action: str
    version: int


def parse(text: str) -> tuple[Step, ...]:
    """Return the steps of lines, each with a volume and what is done with it."""
    words = [line.split() for line in text.split("\n") if line.strip()]
    pairs = [(volume, action) for volume, *actions in words for action in actions]
    return tuple(Step(*pair, version) for version, pair in enumerate(pairs, 1))


#: The whole life.
STEPS: Final = parse("""
    template  create start write stop
    work      create start write stop start
    snapshot  start write
    work      write
    template  start write stop
    none      create start write enlarge
    work      write stop
    none      write stop
    snapshot  stop
    bare      create start write stop start write enlarge stop
    work      revert start write stop
    none      enlarge start write stop import_data start write stop
    work      import_data import_data drop_import start
    none      import_template start
    template  start write
    work      write
    none      write stop
    template  stop
    work      stop revert
    snapshot  start write
    work      remove
    template  start write stop
    snapshot  stop
    bare      start write stop
    work      create start write stop
""")


#: Features that are needed for actions, and for volumes.
_NEEDED: Final = {
    "bare": {"no_snapshot"},
    "snapshot": {"snapshots", "snapshot_running_source"},
    "drop_import": {"import_data"},
    "enlarge": {"stopped_resize", "online_resize"},
    "import_data": {"import_data"},
    "import_template": {"import_volume"},
    "revert": {"revisions"},
}


def possible(steps: Iterable[Step], lacks: frozenset[str]) -> list[Step]:
    """Return the steps that need nothing that a driver lacks.

    :param lacks: features.
    """
    none: set[str] = set()
    return [
        step
        for step in steps
        if not (_NEEDED.get(step.volume, none) | _NEEDED.get(step.action, none)) & lacks
    ]


def _kept(volume: str, lacks: frozenset[str]) -> int:
    """Return how many revisions a volume has, with a driver that lacks something."""
    keep = _SAVED[volume][2]
    most = 0 if "revisions" in lacks else 1 if "many_revisions" in lacks else keep
    return min(keep, most)


def states_after(steps: Iterable[Step]) -> list[Mapping[str, State]]:
    """Return what all volumes hold: before the first step, and after each."""
    states: dict[str, State] = dict.fromkeys(_SAVED, State())
    history = [dict(states)]
    for step in steps:
        if step.volume in states:
            state, source = states[step.volume], states["template"].committed
            states[step.volume] = _after(state, step.action, step.version, source)
        history.append(dict(states))
    return list(history)


def _after(state: State, action: str, version: int, template: Image | None) -> State:
    """Return what a volume holds after an action.

    :param version: what is written in it.
    :param template: what is committed in the template.
    """
    image, dirty = state.committed or (), state.dirty or ()
    former = (*state.former, image) if image else state.former
    left = State(image, state.former, fresh=True)
    states: dict[str, Callable[[], State]] = {
        "create": lambda: State(_EMPTY),
        "start": lambda: dataclasses.replace(left, dirty=image),
        "write": lambda: State(image, state.former, _written(dirty, version, _FLUSHED)),
        "stop": lambda: State(_written(dirty, version, _UNFLUSHED), former),
        "revert": lambda: State(former[-2], (*former[:-2], image)),
        "import_data": lambda: State((version,) * _BLOCKS, former),
        "import_template": lambda: State(template, former),
        "drop_import": lambda: state,
        "remove": State,
        "enlarge": lambda: (
            State(image, state.former, dirty + _EMPTY)
            if dirty
            else State(image + _EMPTY, state.former)
        ),
    }
    return states[action]()


_FLUSHED: Final = range(0, _BLOCKS, 3)
_UNFLUSHED: Final = range(8, 40)


def _written(image: Image, version: int, blocks: range) -> Image:
    return tuple(version if n in blocks else old for n, old in enumerate(image))


def _write(path: Path, version: int, blocks: Sequence[int], *, flush: bool) -> None:
    """Write one version to some blocks, as a VM does."""
    with path.open("r+b", buffering=0) as file:
        for number in blocks:
            file.seek(number * _BLOCK)
            file.write(_block(version))
        if flush:
            os.fsync(file.fileno())


def _block(version: int) -> bytes:
    return version.to_bytes(8, "little") * (_BLOCK // 8)


def _read(path: Path) -> Image:
    content = path.read_bytes()
    return tuple(
        _version(content[at : at + _BLOCK]) for at in range(0, len(content), _BLOCK)
    )


def _version(block: bytes) -> int:
    version = int.from_bytes(block[:8], "little")
    return version if block == _block(version)[: len(block)] else _GARBAGE


class Life:
    """The volumes of a pool, for steps.

    :param pool: set up.
    :param runner: runs the coroutines.
    :param lacks: features that its driver lacks.
    """

    def __init__(
        self, pool: Pool, runner: asyncio.Runner, lacks: frozenset[str]
    ) -> None:
        self._pool = pool
        self.runner = runner
        #: Whether it keeps the revisions that are found while they are looked at.
        self.has_room = "many_revisions" not in lacks
        self.volumes: dict[str, Volume] = {}
        for name, (vm, volume, _) in _SAVED.items():
            if _NEEDED.get(name, set()) & lacks:
                continue
            config = {**KINDS["saved"], "name": volume, "size": _SIZE}
            config["revisions_to_keep"] = _kept(name, lacks)
            self.volumes[name] = pool.init_volume(Owner(vm), config)
        if _NEEDED["snapshot"] & lacks:
            return
        # of the same VM as another one, and so perhaps in the same directory
        source = {**KINDS["snapshot"], "source": self.volumes["template"]}
        self.volumes["snapshot"] = pool.init_volume(Owner("work"), source)

    def close(self) -> None:
        """Forget the pool, as the end of a process does."""
        self.runner.run(self._pool.destroy())

    def take(self, step: Step) -> None:
        """Take a step."""
        self.runner.run(self._act(self.volumes[step.volume], step))

    async def _act(self, volume: Volume, step: Step) -> None:
        match step.action:
            case "create":
                await volume.create()
            case "start":
                await volume.start()
            case "write":
                _write(volume.path, step.version, _FLUSHED, flush=True)
            case "stop":
                # nobody has flushed this: the commit has to
                _write(volume.path, step.version, _UNFLUSHED, flush=False)
                await volume.stop()
            case "revert":
                await volume.revert()
            case "remove":
                await volume.remove()
            case "enlarge":
                await volume.resize(volume.size + _SIZE)
            case "import_template":
                await volume.import_volume(self.volumes["template"])
            case _:
                path = await volume.import_data(_SIZE)
                _write(path, step.version, range(_BLOCKS), flush=False)
                await volume.import_data_end(step.action == "import_data")


def examine(
    life: Life,
    before: Mapping[str, State],
    after: Mapping[str, State],
    step: Step | None = None,
) -> None:
    """Look at all volumes of a pool that was opened anew, and use them.

    :param before: what they held before a step.
    :param after: and after it.
    :param step: the one that was perhaps not finished; None if all were.
    :raise AssertionError: something is neither the one nor the other, or of no use.
    """
    run = life.runner.run
    if snapshot := life.volumes.get("snapshot"):
        run(_use_snapshot(snapshot, run(_exported(life.volumes["template"]))))
    for name in _SAVED.keys() & life.volumes.keys():
        own = step if step is not None and step.volume == name else None
        try:
            found = life.volumes[name]
            run(_examine(found, before[name], after[name], own, room=life.has_room))
        except StoragePoolException as error:
            raise AssertionError(f"{name} is of no use: {error}") from error
        except AssertionError as error:
            during = f" in {step.action} of {step.volume}" if step else ""
            raise AssertionError(f"{name}{during}: {error}") from error


async def _use_snapshot(volume: Volume, source: Image | None) -> None:
    if source is not None:
        await volume.start()
        found = _read(volume.path)
        if found != source:
            raise AssertionError(
                f"a snapshot of {_told(source)} starts with {_told(found)}"
            )
        await volume.stop()


async def _examine(
    volume: Volume, before: State, after: State, step: Step | None, *, room: bool
) -> None:
    keep = volume.revisions_to_keep
    ids = list(volume.revisions)
    is_dirty = volume.is_dirty()
    committed = await _exported(volume)
    dirty = None
    if committed is None and not is_dirty:
        if ids and step is None:
            raise AssertionError(f"nothing but revisions is left: {ids}")
        ids = []
    kept = keep
    if keep > 0 and room:
        volume.revisions_to_keep = keep + _ROOM
    elif keep > 0:
        # each commit drops a revision, that of what is open, too: one can be seen
        kept = 0 if is_dirty else 1
        ids = ids[len(ids) - kept :]
    if is_dirty:
        await volume.start()
        dirty = _read(volume.path)
        await volume.stop()
    former = []
    for revision in ids:
        await volume.revert(revision)
        former.append(await _exported(volume) or ())
    found = State(committed, tuple(former), dirty)
    for problem in _problems(found, before, after, step, kept):
        raise AssertionError(
            f"{problem}\n found {_shown(found)}\n before {_shown(before)}"
            f"\n after {_shown(after)}"
        )
    volume.revisions_to_keep = keep
    if committed is None and dirty is None:
        await volume.remove()
        await volume.create()
    await volume.start()
    _write(volume.path, _LAST, range(4), flush=True)
    await volume.stop()
    image = await _exported(volume) or ()
    if image[:4] != (_LAST,) * 4:
        raise AssertionError(f"what a session wrote is not committed: {_told(image)}")


def _problems(
    found: State, before: State, after: State, step: Step | None, keep: int
) -> Iterator[str]:
    """Yield what is wrong with a volume that keeps so many revisions."""
    sides = [before, after]
    if keep < 0:
        # what its VM has open is the only image
        sides = [
            dataclasses.replace(s, committed=None) if s.dirty else s for s in sides
        ]
    if not any(
        (found.committed == side.committed and _is_dirty_of(found, side, step))
        or _is_unstarted(found, side, step)
        for side in sides
    ):
        yield "its images are neither those before nor those after the step"
    if step is not None and step.action == "remove":
        return  # revisions may go one by one
    known = {before.committed, after.committed, *before.former, *after.former}
    if not known.issuperset(found.former):
        yield "a revision holds what was never committed"
    kept = {*before.former[-keep:]} & {*after.former[-keep:]} if keep > 0 else set()
    if not kept.issubset(found.former):
        yield "a revision is lost"


def _is_dirty_of(found: State, side: State, step: Step | None) -> bool:
    """Tell whether what a VM had open is that of a state, or on the way from there."""
    if found.dirty is None or side.dirty is None:
        # what no VM has brought to the disk since its start may be no start at all
        return found.dirty is None and (side.dirty is None or side.fresh)
    return _is_mixture(found.dirty, side.dirty, step)


def _is_unstarted(found: State, side: State, step: Step | None) -> bool:
    """Tell whether the one image of a volume without snapshots is in its place again.

    As long as its VM has flushed nothing, there may have been no start.
    """
    if side.committed is not None or side.dirty is None or not side.fresh:
        return False
    is_there = found.dirty is None and found.committed is not None
    return is_there and _is_mixture(found.committed or (), side.dirty, step)


def _is_mixture(found: Image, old: Image, step: Step | None) -> bool:
    """Tell whether each block is as it was, or what a step was writing."""
    new = old if step is None else (step.version,) * len(old)
    return len(found) == len(old) and all(map(_one_of, found, old, new))


def _one_of(found: int, old: int, new: int) -> bool:
    return found in (old, new)


async def _exported(volume: Volume) -> Image | None:
    """Return the committed image; None if there is none."""
    with contextlib.suppress(StoragePoolException, FileNotFoundError):
        path = await volume.export()
        try:
            return _read(path)
        finally:
            await volume.export_end(path)
    return None


def _shown(state: State) -> str:
    former = ", ".join(map(_told, state.former)) or "none"
    return (
        f"committed {_told(state.committed)}; open {_told(state.dirty)};"
        f" revisions {former}"
    )


def _told(image: Image | None) -> str:
    """Return an image as versions, each with the number of blocks that have it."""
    if image is None:
        return "nothing"
    counts = {version: image.count(version) for version in dict.fromkeys(image)}
    words = (f"{n} of {'garbage' if v < 0 else v}" for v, n in counts.items())
    return f"<{', '.join(words)}>"
