"""Events against a naive model: every handler asked at every event, in the open."""

import fnmatch

from hypothesis import given
from hypothesis import strategies as st

from qubes_itests.core.event_names import declare
from qubes_itests.core.events import Emitter, SharedHandlers, handler

EVENTS = ("a", "a:b", "a:bc", "b", "b:", "c:d")
declare(*EVENTS)
PATTERNS = (*EVENTS, "*", "a*", "a:*", "b:*", "?", "c:?", "[ab]")

level = st.lists(
    st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=3), max_size=4
)


def _function(label, patterns, *, by_yield):
    if by_yield:

        def function(_subject, event, **_kwargs):
            yield (label, event)

    else:

        def function(_subject, event, **_kwargs):
            return [(label, event)]

    return handler(*patterns)(function)


def _class(base, number, definitions):
    """Return a subclass with these handlers, and what the model knows of them."""
    functions = {
        f"on_{index}": _function((number, index), patterns, by_yield=index % 2)
        for index, patterns in enumerate(definitions)
    }
    known = [
        (pattern, function, (number, index))
        for index, function in enumerate(functions.values())
        for pattern in function.ha_events
    ]
    return type(f"C{number}", (base,), functions), known


def _expected(levels, event, *, pre_event):
    return [
        (label, event)
        for known in (reversed(levels) if pre_event else levels)
        for pattern, _, label in known
        if fnmatch.fnmatchcase(event, pattern)
    ]


class Model:
    """Classes one on the other, an object of the last, and a plain list of it all."""

    def __init__(self, definitions):
        self.classes, self.levels, base = [], [], Emitter
        for number, definition in enumerate(definitions):
            base, known = _class(base, number, definition)
            self.classes.append(base)
            self.levels.append(known)
        self.subject = base()
        self.shared = SharedHandlers()
        self.subject.share_handlers(self.shared)
        self.subject.events_enabled = True
        self.levels.append([])  # the object's own

    def add(self, where, pattern, label):
        """Add a handler to a class, or the object; return what removes it."""
        function = _function(label, (), by_yield=label[1] % 2)
        entry = (pattern, function, label)
        if where < len(self.classes):
            self.shared.add(self.classes[where], pattern, function)
        else:
            where = -1
            self.subject.add_handler(pattern, function)
        self.levels[where].append(entry)

        def undo():
            if where < 0:
                self.subject.remove_handler(pattern, function)
            else:
                self.shared.remove(function)
            self.levels[where].remove(entry)

        return undo

    def check(self, event, *, pre_event):
        """Fire an event, and compare."""
        effects = self.subject.fire_event(event, pre_event=pre_event)
        assert effects == _expected(self.levels, event, pre_event=pre_event)


@given(
    definitions=st.lists(level, min_size=1, max_size=4),
    added=st.lists(
        st.tuples(st.integers(0, 4), st.sampled_from(PATTERNS), st.booleans()),
        max_size=8,
    ),
    fired=st.lists(
        st.tuples(st.sampled_from(EVENTS), st.booleans()), min_size=1, max_size=10
    ),
)
def test_same_handlers_in_the_same_order_as_the_model(definitions, added, fired):
    """Also when handlers are added to any class and removed between events."""
    model = Model(definitions)
    for number, (where, pattern, removed) in enumerate(added):
        undo = model.add(where, pattern, ("added", number))
        event, pre_event = fired[number % len(fired)]
        model.check(event, pre_event=pre_event)
        if removed:
            undo()
    for event, pre_event in fired:
        model.check(event, pre_event=pre_event)
