"""Events: order, wildcards, flattening, vetoes, and resolving once."""

import pytest

from qubes_itests.core import events
from qubes_itests.core.event_names import declare
from qubes_itests.core.events import Emitter, SharedHandlers, handler

declare("start", "stop", "feature:*")


class Base(Emitter):
    def __init__(self):
        super().__init__()
        self.seen = []
        self.events_enabled = True

    @handler("start", "stop")
    def on_base(self, event):
        self.seen.append(("base", event))
        return ["base"]

    @handler("feature:*")
    def on_feature(self, event, **kwargs):
        self.seen.append((event, kwargs))


class Derived(Base):
    @handler("start")
    def on_derived(self, event):
        self.seen.append(("derived", event))
        yield "one"
        yield "two"


def test_order_is_base_class_then_subclass_then_instance():
    subject = Derived()
    subject.add_handler("start", lambda *_: "own")
    assert subject.fire_event("start") == ["base", "one", "two", "own"]


def test_pre_event_goes_the_other_way():
    subject = Derived()
    subject.add_handler("start", lambda *_: "own")
    assert subject.fire_event("start", pre_event=True) == ["own", "one", "two", "base"]


def test_wildcard_gets_full_name_and_keywords():
    subject = Derived()
    subject.fire_event("feature:gui", value="1")
    subject.fire_event("featureless")
    assert subject.seen == [("feature:gui", {"value": "1"})]


def test_star_alone_hears_everything():
    subject = Derived()
    heard = []
    subject.add_handler("*", lambda _, event: heard.append(event))
    subject.fire_event("start")
    subject.fire_event("never-heard-of")
    assert heard == ["start", "never-heard-of"]


def test_handlers_are_silent_until_enabled():
    subject = Derived()
    subject.events_enabled = False
    assert subject.fire_event("start") == []
    assert subject.seen == []


def test_handler_may_veto():
    subject = Derived()

    def veto(*_):
        raise PermissionError("no")

    subject.add_handler("start", veto)
    with pytest.raises(PermissionError, match="no"):
        subject.fire_event("start", pre_event=True)
    assert subject.seen == []


def test_removed_handler_is_not_called():
    subject = Derived()
    heard = []
    subject.add_handler("stop", heard.append)
    subject.remove_handler("stop", heard.append)
    subject.fire_event("stop")
    assert heard == []


def sharing(*subjects):
    """Return the handlers that these objects share."""
    shared = SharedHandlers()
    for subject in subjects:
        subject.share_handlers(shared)
    return shared


def test_shared_handlers_reach_subclasses_that_were_resolved():
    """Those of the objects that share them alone, from when they are added."""
    base, derived, other = Base(), Derived(), Derived()
    shared = sharing(base, derived)

    def late(subject, _event):
        subject.seen.append("late")

    def fire():
        for subject in (base, derived, other):
            subject.fire_event("late")
        return base.seen, derived.seen, other.seen

    assert fire() == ([], [], [])
    shared.add(Base, "late", late)
    assert fire() == (["late"], ["late"], [])
    shared.remove(late)
    assert fire() == (["late"], ["late"], [])
    shared.add(Derived, "l*", late)
    assert fire() == (["late"], ["late"] * 2, [])


def test_coroutine_handler_in_synchronous_event_is_an_error():
    subject = Derived()

    async def slow(*_):
        """Never run."""

    subject.add_handler("start", slow)
    with pytest.raises(RuntimeError, match="asynchronous"):
        subject.fire_event("start")


@pytest.mark.asyncio
async def test_async_handlers_are_awaited_in_order():
    subject = Derived()

    async def slow(*_):
        return ["slow"]

    subject.add_handler("start", slow)
    subject.add_handler("start", lambda *_: "last")
    effects = await subject.fire_event_async("start")
    assert effects == ["base", "one", "two", "slow", "last"]


def test_resolution_happens_once_per_class_and_event(monkeypatch):
    fresh = type("Fresh", (Derived,), {})
    subject = fresh()
    calls = []
    resolve = fresh._resolve
    monkeypatch.setattr(
        fresh,
        "_resolve",
        lambda self, event, **kw: calls.append(event) or resolve(self, event, **kw),
    )
    for _ in range(3):
        subject.fire_event("stop")
    assert calls == ["stop"]


def test_effects_are_flattened_one_level():
    """Lists, tuples and generators are; a string is one effect; None is none."""
    subject = Derived()
    effects = [["a", ["b"]], ("c",), (n for n in (1, 2)), "text", b"raw", 7, None, []]
    for effect in effects:
        subject.add_handler("stop", lambda *_, effect=effect: effect)
    flat = ["base", "a", ["b"], "c", 1, 2, "text", b"raw", 7]
    assert subject.fire_event("stop") == flat


def test_wildcards_are_those_of_the_shell():
    subject = Derived()
    heard = []
    for pattern in ("a-*-set:*", "a-??", "a-[xy]z"):
        subject.add_handler(pattern, lambda *_, pattern=pattern: heard.append(pattern))
    for event in ("a-b-set:c", "a-yz", "A-YZ", "a-[xy]z"):
        subject.fire_event(event)
    assert heard == ["a-*-set:*", "a-??", "a-[xy]z", "a-[xy]z"]


def test_added_twice_is_called_once():
    subject = Derived()
    shared, heard = sharing(subject), []
    own, of_class = (lambda *_, n=n: heard.append(n) for n in (1, 2))
    for _ in range(2):
        subject.add_handler("x", own)
        shared.add(Derived, "x", of_class)
    subject.fire_event("x")
    assert heard == [2, 1]


def test_handlers_of_a_mere_mixin_are_called():
    """The mixin is no Emitter, and comes where the method resolution order has it."""

    class Mixin:
        @handler("start")
        def on_mixin(self, _event):
            return "mixin"

    class Mixed(Mixin, Base):
        """Has handlers of two kinds of bases."""

    assert Mixed().fire_event("start") == ["base", "mixin"]


def test_defined_handlers_come_before_added_ones_of_their_class_also_before():
    """Classes go the other way round for an announcement, not those within one."""
    subject = Derived()
    sharing(subject).add(Base, "start", lambda *_: "added")
    assert subject.fire_event("start") == ["base", "added", "one", "two"]
    announced = subject.fire_event("start", pre_event=True)
    assert announced == ["one", "two", "base", "added"]


def test_handler_may_remove_itself_and_others_while_it_is_called():
    """The event goes to those that were there when it was fired."""
    subject = Derived()
    heard = []

    def once(*_):
        heard.append("once")
        subject.remove_handler("x", once)
        subject.remove_handler("x", other)
        subject.add_handler("x", late)

    def other(*_):
        heard.append("other")

    def late(*_):
        heard.append("late")

    subject.add_handler("x", once)
    subject.add_handler("x", other)
    subject.fire_event("x")
    subject.fire_event("x")
    assert heard == ["once", "other", "late"]


@pytest.mark.asyncio
async def test_asynchronous_veto_keeps_later_handlers_from_beginning():
    subject = Derived()

    async def veto(*_):
        raise PermissionError("no")

    subject.add_handler("start", veto)
    with pytest.raises(PermissionError):
        await subject.fire_event_async("start", pre_event=True)
    assert subject.seen == []


@pytest.mark.asyncio
async def test_asynchronous_generator_yields_effects():
    subject = Derived()

    async def slow(*_):
        yield "slow"
        yield "slower"

    subject.add_handler("stop", slow)
    assert await subject.fire_event_async("stop") == ["base", "slow", "slower"]
    with pytest.raises(RuntimeError, match="asynchronous"):
        subject.fire_event("stop")


def test_names_without_end_take_no_memory_without_end():
    """Guests choose names of features, and so names of events."""
    subject = Derived()
    for number in range(events._MOST_RESOLVED + 10):
        subject.fire_event(f"feature:{number}")
    assert len(Derived._resolved) <= events._MOST_RESOLVED
    assert len(subject.seen) == events._MOST_RESOLVED + 10
