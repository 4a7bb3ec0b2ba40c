"""The table of events says what the source fires; handlers of others are refused.

`python tests/unit/core/test_event_names.py` writes the rows of docs/events.md.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qubes_itests.core import event_names, events, ext
from qubes_itests.core.event_names import EVENTS, check_pattern, declare

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "events.md"
ROW = re.compile(r"^\| `[a-z].*\|$", re.MULTILINE)
#: Methods that fire; the last fires what its callers name.
FIRE = {"fire_event", "fire_event_async", "_announce_volumes"}
BY_NAME = {event.name: event for event in EVENTS}


def pattern_of(event):
    return re.sub(":[A-Z]+$", ":*", event.name)


def name_in(node):
    """Return the event of a call, of which what is after the colon does not count."""
    if isinstance(node, ast.JoinedStr):
        node = node.values[0]
    assert isinstance(node, ast.Constant), f"no name is to be seen: {ast.unparse(node)}"
    return re.sub(":.*", ":*", node.value)


def keys_in(function, name, module):
    """Return the keywords that a dict of a function has always, and at times."""
    always, at_times = set(), set()
    if function.args.kwarg is not None and function.args.kwarg.arg == name:
        return set(), {"**"}
    for node in ast.walk(function):
        if not isinstance(node, ast.Assign):
            continue
        target = node.targets[0]
        if isinstance(target, ast.Name) and target.id == name:
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                if key is not None:
                    always.add(key.value)
                else:  # what a method of the module returns, or nothing
                    at_times |= keys_returned(module, value.func.attr)
        if isinstance(target, ast.Subscript) and ast.unparse(target.value) == name:
            at_times.add(target.slice.value)
    return always, at_times


def keys_returned(module, method):
    return {
        key.value
        for function in ast.walk(module)
        if isinstance(function, ast.FunctionDef) and function.name == method
        for node in ast.walk(function)
        if isinstance(node, ast.Dict)
        for key in node.keys
    }


def calls(module):
    """Yield each call that fires, with the innermost function that it is in."""
    within = {}
    called = {node.func for node in ast.walk(module) if isinstance(node, ast.Call)}
    for node in ast.walk(module):
        by_another_name = isinstance(node, ast.Attribute) and node not in called
        assert not (by_another_name and node.attr in FIRE), ast.unparse(node)
    for function in ast.walk(module):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for node in ast.walk(function):
                within[node] = function
    for node, function in within.items():
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in FIRE
            and function.name not in FIRE
        ):
            yield node, function


def fired_in(module):
    """Yield for each place that fires: event, keywords, those at times, pre_event."""
    for call, function in calls(module):
        name = name_in(call.args[0])
        assert name is not None, (
            f"the event's name is not to be seen: {ast.unparse(call)}"
        )
        always, at_times, announces = set(), set(), False
        for keyword in call.keywords:
            if keyword.arg == "pre_event":
                announces = keyword.value.value
            elif keyword.arg is not None:
                always.add(keyword.arg)
            else:
                more = keys_in(function, keyword.value.id, module)
                always, at_times = always | more[0], at_times | more[1]
        yield name_in(call.args[0]), always, at_times, announces


def fired():
    """Return by event what all places in the source that fire it have in common."""
    found = defaultdict(list)
    for folder in ("qubes_itests", "storage", "plugins"):
        for path in (ROOT / folder).rglob("*.py"):
            if "fire" in (text := path.read_text()):
                for name, *how in fired_in(ast.parse(text)):
                    found[name].append(how)
    told = {}
    for name, ways in found.items():
        always = set.intersection(*(way[0] for way in ways))
        at_times = set.union(*(way[0] | way[1] for way in ways)) - always
        told[name] = (always, at_times, {way[2] for way in ways})
    return told


def test_the_table_is_what_the_source_fires():
    """Both ways: names, keywords, and which events are announcements."""
    table = {
        pattern_of(e): (set(e.keywords), set(e.optional), {e.announces})
        for e in EVENTS
        if e.fired
    }
    assert table == fired()
    assert len(BY_NAME) == len(EVENTS)


def rows():
    """Return the rows of the page."""
    return [
        "| `{}` | {} | {}{}{} |".format(
            event.name,
            ", ".join(
                [*(f"`{k}`" for k in event.keywords)]
                + [f"`{k}`" if k == "**" else f"[`{k}`]" for k in event.optional]
            ),
            event.when,
            "" if not event.announces else " (`pre_event`)",
            "" if event.fired else "; fired by Qubes OS only",
        )
        for event in EVENTS
    ]


def test_the_page_lists_the_table():
    on_page = ROW.findall(PAGE.read_text())
    assert on_page == rows(), f"run {Path(__file__).name} to write them"


@pytest.mark.parametrize("mark", [events.handler, ext.handler])
@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("domain-strat", "domain-start"),
        ("property-sett:label", "property-set:*"),
        ("property-set", "property-set:*"),
        ("feature-pre-set:net.fake-ip", "domain-feature-pre-set:*"),
    ],
)
def test_handlers_of_events_that_nobody_declares_are_refused(mark, wrong, meant):
    with pytest.raises(
        ValueError, match=re.escape(f"got {wrong!r}: did you mean {meant!r}")
    ):
        mark("domain-start", wrong)


@pytest.mark.parametrize(
    "pattern", ["domain-x*", "dom?", "device-[xyz]*:usb", "", "x*y"]
)
def test_wildcards_that_match_no_event_are_refused(pattern):
    with pytest.raises(ValueError, match="expected the name of an event"):
        events.handler(pattern)


@given(data=st.data(), event=st.sampled_from(EVENTS), rest=st.text(min_size=1))
def test_any_pattern_that_matches_an_event_is_taken(data, event, rest):
    """Made from a name that can be fired, by wildcards in place of its parts."""
    name = event.name
    if ":" in name:
        # what wildcards are made of in a name stands for itself nowhere
        name = f"{name.partition(':')[0]}:{re.sub('[][*?!]', '', rest)}"
    begin = data.draw(st.integers(0, len(name)))
    end = data.draw(st.integers(begin, len(name)))
    check_pattern(f"{name[:begin]}*{name[end:]}")
    check_pattern("".join("?" if begin <= i < end else c for i, c in enumerate(name)))
    check_pattern(name)


def test_own_events_are_declared(monkeypatch):
    monkeypatch.setattr(event_names, "_patterns", set(event_names._patterns))
    for pattern in ("mine", "mine-too:*", "mine-too:one"):
        with pytest.raises(ValueError, match="mine"):
            events.handler(pattern)
    declare("mine", "mine-too:*")
    for pattern in ("mine", "mine-too:*", "mine-too:one", "*-too:[ab]*"):
        events.handler(pattern)
    with pytest.raises(ValueError, match="'mine-three'"):
        events.handler("mine-three")


@pytest.mark.parametrize("name", ["", "*", "a*b", "a?", "a[b]", "a**"])
def test_what_is_declared_is_a_name(name):
    with pytest.raises(ValueError, match="at its end at most"):
        declare(name)


def write():
    text = PAGE.read_text()
    found = list(ROW.finditer(text))
    first, last = found[0].start(), found[-1].end()
    PAGE.write_text(text[:first] + "\n".join(rows()) + text[last:])


if __name__ == "__main__":
    write()
