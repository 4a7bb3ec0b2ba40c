"""Events: order, wildcards, flattening, vetoes, and resolving once."""

import pytest

from qubes_itests.core.events import Emitter, handler


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


def test_class_handler_added_late_reaches_subclasses_that_were_resolved():
    subject = Derived()
    subject.fire_event("late")

    def late(vm, _event):
        vm.seen.append("late")

    Base.add_class_handler("late", late)
    try:
        subject.fire_event("late")
    finally:
        Base.remove_class_handler("late", late)
    subject.fire_event("late")
    assert subject.seen == ["late"]


def test_coroutine_handler_in_synchronous_event_is_an_error():
    subject = Derived()

    async def slow(*_):
        """Never run."""

    subject.add_handler("start", slow)
    with pytest.raises(TypeError, match="coroutine function"):
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
    subject = Derived()
    calls = []
    resolve = Derived._resolve.__func__
    monkeypatch.setattr(
        Derived,
        "_resolve",
        classmethod(lambda cls, event: calls.append(event) or resolve(cls, event)),
    )
    for _ in range(3):
        subject.fire_event("stop")
    assert calls == ["stop"]
