"""States of domains' memory, fixed and random."""

from __future__ import annotations

from hypothesis import strategies as st

from qubes_itests.qmemman.state import DomainMemory

MIB = 1024**2


def domain(domid, used, actual, maximum=4096):
    """Return a domain; sizes in MiB."""
    return DomainMemory(
        domid=domid,
        used=None if used is None else used * MIB,
        actual=actual * MIB,
        current=actual * MIB,
        maximum=maximum * MIB,
        last_target=actual * MIB,
    )


def total(domains):
    """Return what all hold, bytes."""
    return sum(domain.actual for domain in domains)


free_memory = st.integers(0, 1 << 36)
_size = st.one_of(st.integers(0, 1 << 35), st.integers(190 * MIB, 8192 * MIB))


@st.composite
def _domain(draw, number):
    current, last_target = draw(_size), draw(st.one_of(st.just(0), _size))
    return DomainMemory(
        domid=str(number),
        used=draw(st.one_of(st.none(), _size)),
        actual=max(current, last_target),
        current=current,
        maximum=draw(_size),
        last_target=last_target,
        no_progress=draw(st.booleans()) and draw(st.booleans()),
        slow_memset_react=draw(st.booleans()),
        paused=draw(st.booleans()) and draw(st.booleans()),
    )


@st.composite
def states(draw):
    """Return up to ten domains in any state, dom0 among them or not."""
    first = draw(st.integers(0, 1))
    count = draw(st.integers(0, 10))
    return [draw(_domain(number)) for number in range(first, first + count)]
