"""Lines of logs of guests, as they come."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qubes_itests.guest.link.journal import _entry, _kernel_line

TIME = {"__REALTIME_TIMESTAMP": "1500000"}


def entry(**fields):
    return _entry(json.dumps(TIME | fields).encode())


def test_an_entry_is_who_said_it_and_what():
    said = {"SYSLOG_IDENTIFIER": "app", "_PID": "7", "MESSAGE": "so", "PRIORITY": "3"}
    assert entry(**said) == (3, "app[7]", "so", 1.5)
    assert entry(MESSAGE="so") == (6, "unknown", "so", 1.5)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([104, 105, 255], "hi\\xff"),
        (None, ""),
        (["one", "two"], "one, two"),
        ([[104], "x"], "h, x"),
        ([], ""),
        ([300], "300"),
    ],
)
def test_a_text_may_be_bytes_or_many_or_too_long(value, text):
    assert entry(MESSAGE=value)[2] == text


@pytest.mark.parametrize(
    "line",
    [
        *(b"", b"{}", b"[]", b"1", b"nonsense", b"{" * 100_000, b"[" * 100_000),
        b'{"__REALTIME_TIMESTAMP": "x"}',
        b'{"__REALTIME_TIMESTAMP": 1e999}',
        b'{"__REALTIME_TIMESTAMP": "1", "PRIORITY": "high"}',
        b'{"__REALTIME_TIMESTAMP": ' + b"9" * 400 + b"}",
        # shallow enough for the reader of JSON alone
        *(
            b'{"__REALTIME_TIMESTAMP": "1", "%s": %s}' % (name, b"[" * 600 + b"]" * 600)
            for name in (b"MESSAGE", b"_PID", b"SYSLOG_IDENTIFIER")
        ),
    ],
)
def test_what_is_no_entry_is_passed_over(line):
    assert _entry(line) is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda children: (
        st.lists(children, max_size=4)
        | st.dictionaries(st.text(max_size=3), children, max_size=3)
    ),
)
names = st.sampled_from(
    ["MESSAGE", "PRIORITY", "_PID", "SYSLOG_IDENTIFIER", "__REALTIME_TIMESTAMP"]
)


@given(st.dictionaries(names, json_values))
def test_no_types_of_fields_are_too_odd(fields):
    found = _entry(json.dumps(TIME | fields).encode())
    assert found is None or [int, str, str, float] == list(map(type, found))


def test_a_line_of_the_kernel_has_its_priority_behind_the_facility():
    assert _kernel_line(b"30,339,5140900,-;app[7]: so") == (
        *(6, "kernel", "app[7]: so", None),
    )
    assert _kernel_line(b" SUBSYSTEM=pci") is None


@given(st.binary())
def test_no_line_of_the_kernel_is_too_odd(line):
    found = _kernel_line(line)
    assert found is None or 0 <= found[0] < 8
