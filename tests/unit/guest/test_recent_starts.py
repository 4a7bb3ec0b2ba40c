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
    return made


def test_the_first_start_of_a_kind_is_not_expected_again():
    recent = Recent(2)
    recent.add("a")
    assert recent.missing(Counter()) is None
    recent.add("a")
    assert recent.missing(Counter()) == "a"
    assert recent.missing(Counter("a")) is None


def test_what_started_last_comes_first():
    recent = Recent(2)
    for kind in "ababab":
        recent.add(kind)
    assert recent.missing(Counter()) == "b"
    assert recent.missing(Counter("b")) == "a"
    recent.give_up("b")
    assert recent.missing(Counter()) == "a"
    recent.add("b")
    assert recent.missing(Counter()) == "b"


@given(
    st.integers(1, 5),
    st.lists(st.tuples(KINDS, st.sampled_from(("start", "start", "give up")))),
    st.lists(KINDS),
)
def test_there_are_never_too_many(most, happened, there):
    """Whatever started, as many are kept as started lately, at most so many."""
    recent, waiting, known, latest = Recent(most), Counter(), set(), []
    for kind, what in happened:
        if what == "give up":
            recent.give_up(kind)
            latest = [each for each in latest if each != kind]
        else:
            waiting[kind] = max(0, waiting[kind] - 1)
            recent.add(kind)
            latest = [*latest, *([kind] if kind in known else [])][-most:]
            known.add(kind)
        fill(recent, waiting)
        assert waiting.total() <= most
        assert all(waiting[k] >= n for k, n in Counter(latest).items())
    # whatever else there was: what is surplus goes first, and only that
    crowd = Counter(there)
    before = crowd.copy()
    made = fill(recent, crowd)
    assert made == (Counter(latest) - before).total()
    assert made == 0 or crowd.total() <= most
