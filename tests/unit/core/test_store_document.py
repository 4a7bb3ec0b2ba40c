"""Documents: what is written is read, and what is wrong is refused where it is."""

import contextlib
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from qubes_itests.core import exc
from qubes_itests.core.store import document
from qubes_itests.core.store.document import Element, check_text, parse, to_bytes
from qubes_itests.core.store.file import StoreFormatError

PATH = Path("qubes.xml")

# what XML can hold: neither control characters nor surrogates nor U+FFFE, U+FFFF
TEXT = st.text(
    st.characters(
        exclude_categories=["Cs", "Cc"],
        include_characters="\t\n\r\x7f\x85\u2028",
        exclude_characters="\ufffe\uffff",
    )
)
NAME = st.from_regex(r"[a-z][a-z-]{0,7}", fullmatch=True)


def elements(children):
    return st.builds(
        Element, NAME, st.dictionaries(NAME, TEXT, max_size=3), children=children
    )


LEAVES = st.builds(Element, NAME, st.dictionaries(NAME, TEXT, max_size=3), TEXT)
TREES = elements(
    st.lists(
        st.recursive(LEAVES, lambda e: elements(st.lists(e, max_size=3)), max_leaves=6),
        max_size=4,
    )
)


@hypothesis.given(TREES)
def test_what_is_written_is_read(root):
    data = to_bytes(root)
    assert parse(data, PATH) == root
    assert to_bytes(parse(data, PATH)) == data


@hypothesis.given(st.text(st.characters(), max_size=20))
def test_text_is_checked_as_it_is_parsed(text):
    """A text passes the check if, and only if, it comes back from a document."""
    try:
        check_text(text)
    except ValueError:
        with pytest.raises(ValueError, match="cannot be stored"):
            to_bytes(Element("a", text=text))
    else:
        assert parse(to_bytes(Element("a", text=text)), PATH).text == text


@pytest.mark.parametrize("text", ["\0", "a\x1b[1m", "\ud800", "\uffff", "\x0b"])
def test_features_and_properties_refuse_what_cannot_be_stored(template, text):
    with pytest.raises(exc.QubesValueError, match="cannot be stored"):
        template.features["name"] = text
    with pytest.raises(exc.QubesPropertyValueError, match="cannot be stored"):
        template.kernelopts = text
    assert not template.features
    assert template.kernelopts == ""


@pytest.mark.parametrize(
    ("data", "line", "column", "reason"),
    [
        (b"", 1, 1, "not XML: no element found"),
        (b"<qubes>\n  <a></b>\n</qubes>", 2, 8, "not XML: mismatched tag"),
        (b"<qubes>\n", 2, 1, "not XML: no element found"),
        (b"<qubes/>\n<qubes/>", 2, 1, "not XML: junk after document element"),
        (b"<qubes a='1' a='2'/>", 1, 14, "not XML: duplicate attribute"),
        (b"<qubes>\n &nbsp;</qubes>", 2, 2, "not XML: undefined entity"),
        (b"<qubes>\xff</qubes>", 1, 8, r"not XML: not well-formed"),
        (b"<qubes>\0</qubes>", 1, 8, r"not XML: not well-formed"),
        (b"<qubes>\n words <a/>\n</qubes>", 3, 1, "text beside its elements"),
        (b"\n<!DOCTYPE qubes>\n<qubes/>", 2, 16, "document type declaration"),
    ],
)
def test_refused_where_it_is_wrong(data, line, column, reason):
    with pytest.raises(StoreFormatError, match=reason) as caught:
        parse(data, PATH)
    assert (caught.value.line, caught.value.column) == (line, column)
    assert str(caught.value).startswith(f"qubes.xml:{line}:{column}: ")


def test_entities_are_never_expanded():
    bomb = '<!DOCTYPE q [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]><q>&b;</q>'
    with pytest.raises(StoreFormatError, match="document type declaration"):
        parse(bomb.encode(), PATH)


def test_files_outside_are_never_read(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("x")
    document = f'<!DOCTYPE q SYSTEM "file://{secret}"><q/>'
    with pytest.raises(StoreFormatError, match="document type declaration"):
        parse(document.encode(), PATH)


def test_bounds(monkeypatch):
    deep = b"<a>" * 100 + b"</a>" * 100
    with pytest.raises(StoreFormatError, match="too many in each other"):
        parse(deep, PATH)
    monkeypatch.setattr(document, "_MOST_ELEMENTS", 10)
    with pytest.raises(StoreFormatError, match="too many elements"):
        parse(b"<a>" + b"<b/>" * 10 + b"</a>", PATH)
    monkeypatch.setattr(document, "_MOST_BYTES", 10)
    with pytest.raises(StoreFormatError, match="more than 10 bytes"):
        parse(b"<a>        </a>", PATH)


@hypothesis.given(st.binary(max_size=200))
@hypothesis.example(b"<?xml version='1.0' encoding='no'?><a/>")
@hypothesis.example(b"<?xml version='1.0' encoding='utf-16'?><a/>")
def test_any_bytes_are_parsed_or_refused(data):
    with contextlib.suppress(StoreFormatError):
        assert parse(data, PATH).line >= 1
