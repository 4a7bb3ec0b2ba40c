"""What tests of extensions use in place of a VM."""

import asyncio
import unittest
from collections import Counter

import pytest

from qubes_itests.core.event_names import declare
from qubes_itests.core.events import handler
from qubes_itests.testcase import QubesTestCase, TestEmitter

declare("asked")


class Stand(TestEmitter):
    """A VM of a test of an extension, as these declare theirs."""

    def __init__(self, name, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.name = name

    @handler("asked")
    def on_asked(self, _event, **_kwargs):
        yield "answer"


@pytest.fixture
def case():
    return QubesTestCase("id")


def test_it_counts_events_and_calls_handlers_once_enabled(case):
    stand = Stand("sys-usb")
    assert stand.fire_event("asked", options={"a": ["b"]}) == []
    stand.events_enabled = True
    assert stand.fire_event("asked", options={"a": ["b"]}) == ["answer"]
    assert asyncio.run(stand.fire_event_async("later", tags={"x"})) == []
    assert Counter(stand.fired_events.values()) == {1: 1, 2: 1}
    case.assertEventFired(stand, "asked")
    case.assertEventFired(stand, "asked", kwargs={"options": {"a": ["b"]}})
    case.assertEventFired(stand, "later", kwargs={"tags": {"x"}})
    case.assertEventNotFired(stand, "asked", kwargs={"options": {}})
    case.assertEventNotFired(stand, "never")
    stand.fire_event("asked", options=bytearray(b"no key of a mapping"))
    case.assertEventFired(
        stand, "asked", kwargs={"options": bytearray(b"no key of a mapping")}
    )


def test_what_was_not_so_fails_and_says_what_was_fired(case):
    stand = Stand("sys-usb")
    stand.fire_event("asked", port="1-1")
    with pytest.raises(AssertionError, match=r"'told' was not fired .*\['asked'\]"):
        case.assertEventFired(stand, "told")
    with pytest.raises(AssertionError, match="'1-2'"):
        case.assertEventFired(stand, "asked", kwargs={"port": "1-2"})
    with pytest.raises(AssertionError, match="was fired"):
        case.assertEventNotFired(stand, "asked")


def test_no_runner_takes_it_for_a_test():
    assert not issubclass(TestEmitter, unittest.TestCase)
    assert not TestEmitter.__test__
