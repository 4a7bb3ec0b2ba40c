"""How many clones of which kind are started ahead."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from qubes_itests.guest.start.ahead import Recent

KINDS = st.sampled_from("abc")


def fill(recent, waiting):
    """Do what is to be done until nothing is missing; return how often one was made."""
    made = 0
    while (kind := recent.missing(waiting)) is not None:
        while (unwanted := recent.surplus(waiting)) is not None:
            waiting[unwanted] -= 1
        waiting[kind] += 1
        made += 1
        assert made < 100
    recent.end_row()
    return made


def started(recent, kinds):
    for kind in kinds:
        recent.add(kind)


def test_the_first_start_of_a_kind_is_not_expected_again():
    recent = Recent(2)
    started(recent, "a")
    assert recent.missing(Counter()) is None
    started(recent, "a")
    assert recent.missing(Counter()) == "a"
    assert recent.missing(Counter("a")) is None


def test_as_many_as_came_in_a_row_are_expected():
    recent, waiting = Recent(8), Counter()
    started(recent, "a")
    for _ in range(3):
        started(recent, "a")
        fill(recent, waiting)
    assert waiting == Counter("a")
    waiting.clear()
    started(recent, "aaaaa")
    fill(recent, waiting)
    assert waiting == Counter("aaaaa")
    # for some rows more
    for _ in range(4):
        waiting["a"] -= 1
        started(recent, "a")
        fill(recent, waiting)
    assert recent.expected() == Counter("a")


def test_the_latest_kinds_come_first():
    recent = Recent(3)
    started(recent, "ab")
    for row in ("aaa", "bb"):
        started(recent, row)
        recent.end_row()
    assert recent.expected() == Counter("bba")
    assert recent.missing(Counter()) == "b"
    recent.give_up("b")
    assert recent.expected() == Counter("aaa")
    started(recent, "b")
    assert recent.missing(Counter()) == "b"


@given(
    st.integers(1, 5),
    st.lists(st.tuples(KINDS, st.sampled_from(("start", "row", "give up")))),
    st.lists(KINDS),
)
def test_there_are_never_too_many(most, happened, there):
    """Whatever has started, what is expected is there in the end, and no more made."""
    recent, waiting = Recent(most), Counter()
    for kind, what in happened:
        if what == "give up":
            recent.give_up(kind)
            assert recent.expected()[kind] == 0
        elif what == "row":
            fill(recent, waiting)
        else:
            waiting[kind] = max(0, waiting[kind] - 1)
            before = recent.expected()[kind]
            recent.add(kind)
            assert recent.expected()[kind] >= before
        assert recent.expected().total() <= most
        assert waiting.total() <= most
    # whatever else there was: what is surplus goes first, and only that
    expected, crowd = recent.expected(), Counter(there)
    made = fill(recent, crowd)
    assert made == (expected - Counter(there)).total()
    assert crowd >= expected
    assert made == 0 or crowd == expected
