"""The arithmetic of power cuts: what may, must and cannot be on a disk afterwards."""

from __future__ import annotations

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qubes_itests.faultdisk import sparse
from qubes_itests.faultdisk.crash import (
    CrashState,
    choose_states,
    flushed_before,
    survivors,
)
from qubes_itests.faultdisk.operations import SECTOR, Kind, Operation, read_journal
from qubes_itests.faultdisk.recording import Recording
from qubes_itests.host.filesystem import FilesystemType

SECTORS = 16


def _write(number, start, length):
    # Every write has content of its own, so what is found tells where it is from.
    return Operation.write(start * SECTOR, bytes([number + 1]) * (length * SECTOR))


@st.composite
def histories(draw):
    kinds = draw(st.lists(st.sampled_from("wwwzfn"), max_size=30))
    operations = []
    for number, kind in enumerate(kinds):
        start = draw(st.integers(0, SECTORS - 1))
        length = draw(st.integers(1, SECTORS - start))
        if kind == "w":
            operations.append(_write(number, start, length))
        elif kind == "z":
            operations.append(Operation(Kind.ZERO, start * SECTOR, length * SECTOR))
        elif kind == "f":
            operations.append(Operation(Kind.FLUSH))
        else:
            operations.append(Operation.note(b"here"))
    return operations


def play(patches, disk=None):
    disk = bytearray(SECTORS * SECTOR) if disk is None else bytearray(disk)
    for offset, content in patches:
        disk[offset : offset + len(content)] = content
    return bytes(disk)


def changes(operations):
    return [(one.offset, one.content) for one in operations if one.changes]


def after(operations, state, whole=()):
    certain = play(changes(operations[: flushed_before(operations, state.cut)]))
    return play(survivors(operations, state, whole), certain)


def sectors(disk):
    return [disk[i : i + SECTOR] for i in range(0, len(disk), SECTOR)]


@given(histories(), st.integers(0, 2**32))
def test_each_sector_is_the_flushed_one_or_one_written_since(operations, seed):
    for state in choose_states(operations, seed, 8):
        flushed = flushed_before(operations, state.cut)
        possible = [sectors(play(changes(operations[:flushed])))]
        for number in range(flushed, state.cut):
            single = changes(operations[number : number + 1])
            possible.append(sectors(play(single, after_all(operations, number))))
        for number, sector in enumerate(sectors(after(operations, state))):
            assert sector in [disk[number] for disk in possible]


def after_all(operations, number):
    return play(changes(operations[:number]))


@given(histories(), st.integers(0, 2**32))
def test_what_was_flushed_is_there_exactly(operations, seed):
    """A cut right after a flush leaves no choice."""
    for cut in range(len(operations) + 1):
        if cut and operations[cut - 1].kind is Kind.FLUSH:
            state = CrashState(cut, seed, 0)
            assert after(operations, state) == play(changes(operations[:cut]))


@given(histories(), st.integers(0, 2**32), st.integers(0, 50))
def test_the_same_numbers_name_the_same_state(operations, seed, count):
    first = choose_states(operations, seed, count)
    assert first == choose_states(operations, seed, count)
    assert first == sorted(first)
    assert len(set(first)) == count
    assert all(0 <= state.cut <= len(operations) for state in first)
    for state in first[:3]:
        assert after(operations, state) == after(operations, state)


@given(st.integers(0, 2**32))
def test_what_is_declared_whole_is_never_torn(seed):
    operations = [_write(0, 0, SECTORS)]
    for index in range(20):
        state = CrashState(1, seed, index)
        disk = after(operations, state, whole=[(4 * SECTOR, 1)])
        assert len(set(sectors(disk))) == 1


def test_writes_are_kept_lost_and_torn():
    """Of one large write all, nothing, a beginning, and scattered sectors are seen."""
    operations = [_write(0, 0, SECTORS)]
    seen = set()
    for index in range(400):
        disk = sectors(after(operations, CrashState(1, 7, index)))
        written = [any(sector) for sector in disk]
        seen.add(
            "all"
            if all(written)
            else "none"
            if not any(written)
            else "beginning"
            if written == sorted(written, reverse=True)
            else "scattered"
        )
    assert seen == {"all", "none", "beginning", "scattered"}


def test_a_lie_makes_nothing_certain():
    operations = [_write(0, 0, 1), Operation(Kind.LIE), Operation.note(b"")]
    assert flushed_before(operations, 3) == 0
    assert any(not any(after(operations, CrashState(3, 1, i))) for i in range(50))


def test_cuts_come_everywhere_and_often_after_promises():
    operations = [_write(i % 200, 0, 1) for i in range(1000)]
    operations[500] = Operation(Kind.FLUSH)
    cuts = [state.cut for state in choose_states(operations, 1, 400)]
    near = sum(501 <= cut <= 504 for cut in cuts)
    assert 100 < near < 300
    assert min(cuts) < 100
    assert max(cuts) > 900


@given(histories())
def test_a_journal_is_read_as_it_was_written(operations):
    journal = b"".join(operation.encode() for operation in operations)
    assert list(read_journal(io.BytesIO(journal))) == operations


@given(histories().filter(bool), st.data())
def test_a_journal_that_was_cut_off_is_refused(operations, data):
    journal = b"".join(operation.encode() for operation in operations)
    boundaries = {0}
    for operation in operations:
        boundaries.add(max(boundaries) + len(operation.encode()))
    length = data.draw(st.integers(0, len(journal)))
    if length in boundaries:
        return
    with pytest.raises(ValueError, match="ends within"):
        list(read_journal(io.BytesIO(journal[:length])))


@settings(max_examples=20)
@given(histories(), st.integers(0, 2**32))
def test_states_made_one_after_another_are_those_made_alone(
    tmp_path_factory, operations, seed
):
    """The images that a search derives from each other equal those of a replay."""
    directory = tmp_path_factory.mktemp("images")
    base, certain, alone = (directory / name for name in ("base", "certain", "alone"))
    base.write_bytes(b"\xff" * SECTORS * SECTOR)
    recording = Recording(FilesystemType.XFS, base, tuple(operations))
    sparse.copy_sparse(base, certain)
    done = 0
    for state in choose_states(operations, seed, 5):
        done = recording.advance(certain, done, state)
        together = directory / "together"
        sparse.copy_sparse(certain, together)
        recording.lose(together, state)
        sparse.copy_sparse(recording.base, alone)
        recording.advance(alone, 0, state)
        recording.lose(alone, state)
        assert together.read_bytes() == alone.read_bytes()


def test_a_kept_state_is_what_it_was(tmp_path):
    base = tmp_path / "base"
    with base.open("wb") as file:
        file.truncate(64 << 20)
        file.seek(5 << 20)
        file.write(b"begin")
    operations = (_write(0, 0, 3), Operation(Kind.FLUSH), Operation.note(b"x"))
    state = CrashState(2, 5, 17)
    Recording(FilesystemType.BTRFS, base, operations).save(tmp_path / "kept", state)
    again, same = Recording.load(tmp_path / "kept", tmp_path / "new")
    assert (again.operations, same, again.kind) == (
        operations,
        state,
        FilesystemType.BTRFS,
    )
    assert again.base.read_bytes() == base.read_bytes()
    assert again.base.stat().st_blocks < 64
    assert again.notes() == ("x",)
    assert again.notes(end=2) == ()
