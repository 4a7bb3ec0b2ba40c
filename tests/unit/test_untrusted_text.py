"""Whatever a guest says: no terminal obeys it, no line is forged, no CI is told."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qubes_itests.untrusted_text import quoted, safe_text

#: What does harm somewhere, and what it is made of.
BAD = [
    "\x1b[2J\x1b]0;title\x07", "\x9b31m", "\x9d", "\r", "\n", "\r\n", "\v", "\f",
    "\x85", "\u2028", "\u2029", "\u202e", "\u2066", "\u200b", "\ufeff", "\x00", "\x7f",
    "\ud800", "::", "::error::", "##[error]", "##vso[task.complete]", "##teamcity[x]",
    "###[group]", "#", "[", " ", "\t", "\xa0", "FAKE: 1 passed", "section_end:1:x\r",
]  # fmt: skip
texts = st.lists(st.sampled_from(BAD) | st.text(max_size=5), max_size=12).map("".join)
raw = texts | st.binary(max_size=40) | texts.map(lambda t: t.encode("utf-8", "replace"))


def is_harmless(line):
    return (
        line.replace("\t", "").isprintable()
        and not line.lstrip().startswith("::")
        and not re.search(r"##\w*\[", line)
    )


@given(raw, st.none() | st.integers(1, 30))
def test_one_line_stays_one_harmless_line(text, limit):
    safe = safe_text(text, limit=limit)
    assert safe.isprintable()
    assert is_harmless(safe)
    assert limit is None or len(safe) <= limit
    assert safe_text(safe, limit=None) == safe


@given(raw, st.none() | st.integers(1, 30))
def test_lines_stay_harmless_lines(text, limit):
    safe = safe_text(text, lines=True, limit=limit)
    assert all(map(is_harmless, safe.split("\n")))
    assert limit is None or len(safe) <= limit
    assert safe_text(safe, lines=True, limit=None) == safe


@given(raw)
def test_lines_that_are_quoted_begin_with_our_mark(text):
    lines = quoted(safe_text(text, lines=True)).splitlines()
    assert lines
    assert all(line.startswith("| ") for line in lines)


@given(st.text(st.characters(exclude_categories=["C", "Z"]), max_size=30))
def test_what_shows_and_orders_nothing_is_left_as_it_is(text):
    text = text.replace(":", "").replace("#", "")
    assert safe_text(text) == safe_text(text.encode()) == text


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        (b"plain: caf\xc3\xa9 #1 [x] a::b", "plain: café #1 [x] a::b"),
        (b"\x1b[31mred", r"\x1b[31mred"),
        (b"one\r\ntwo\tthree\n", r"one\r\ntwo\tthree\n"),
        (b"\xff\x9b", r"\xff\x9b"),
        ("\x9b1m\u202e", r"\x9b1m\u202e"),
        ("  ::error::no", r"  \x3a:error::no"),
        ("a ##[error]no", r"a \x23#[error]no"),
    ],
)
def test_examples(text, safe):
    assert safe_text(text) == safe


def test_lines_keep_their_ends_and_tabs():
    assert safe_text(b"a\r\n\tb\rc\n", lines=True) == "a\n\tb\\rc\n"


@pytest.mark.parametrize("size", [10, 4096, 10**8])
def test_a_text_without_end_costs_no_more_than_its_limit(size):
    text = safe_text(memoryview(bytes(size)), limit=100)
    assert len(text) <= 100
