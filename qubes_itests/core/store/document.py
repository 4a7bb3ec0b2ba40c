"""XML documents: trees of elements that know their lines, and their bytes.

Expat parses them: it alone of the XML parsers tells line and column of every element,
and is part of Python.  A document type declaration is refused where it begins, so
there are no entities to expand and nothing outside the file is ever read.
"""

from __future__ import annotations

import contextlib
import gc
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NoReturn
from xml.parsers import expat

from qubes_itests.core.store.file import StoreFormatError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = [
    "Element",
    "check_text",
    "no_collection",
    "parse",
    "storable",
    "to_bytes",
]

#: A VM takes about 2,000 bytes and 50 elements; there are 10,000 VMs at the most.
_MOST_BYTES: Final = 256 * 1024**2
_MOST_ELEMENTS: Final = 5_000_000
_MOST_DEPTH: Final = 16

_INDENT: Final = "  "

#: Characters to show on both sides of one that is refused.
_AROUND: Final = 20

_IMPOSSIBLE: Final = re.compile(
    "[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
)
#: What has a meaning in text or in an attribute, or would not be read as written.
_SPECIAL: Final = re.compile('[&<>"\t\n\r]')
_IN_TEXT: Final = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "\r": "&#13;"})
_IN_ATTRIBUTE: Final = _IN_TEXT | str.maketrans(
    {'"': "&quot;", "\t": "&#9;", "\n": "&#10;"}
)


@dataclass(slots=True)
class Element:
    """An element of a document: it has text, or children, or neither.

    :param tag: its name.
    :param attributes: names and values.
    :param text: what is between its tags when it has no children.
    :param line: where it was found, from 1 on; 0 when it was not parsed.
    :param column: where in that line, from 1 on.
    """

    tag: str
    attributes: dict[str, str] = field(default_factory=dict)
    text: str = ""
    children: list[Element] = field(default_factory=list)
    line: int = field(default=0, compare=False)
    column: int = field(default=0, compare=False)

    def add(self, tag: str, text: str = "", **attributes: str) -> Element:
        """Append a child and return it."""
        child = Element(tag, attributes, text)
        self.children.append(child)
        return child

    def find_all(self, tag: str) -> Iterator[Element]:
        """Yield the children of that name."""
        return (child for child in self.children if child.tag == tag)

    def grandchildren(self, tag: str, subtag: str) -> Iterator[Element]:
        """Yield the children named `subtag` of the children named `tag`."""
        for child in self.find_all(tag):
            yield from child.find_all(subtag)


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Have no garbage collected while a document is read or made."""
    # Hundreds of thousands of objects are made that all stay.  Each collection would
    # look through them in vain, which takes half of the time of a load.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def check_text(text: str) -> str:
    """Return a text if a document can hold it.

    :raise ValueError: when it has control characters (but tab, line feed and carriage
        return), or halves of surrogate pairs.
    """
    if found := _IMPOSSIBLE.search(text):
        around = text[max(0, found.start() - _AROUND) : found.end() + _AROUND]
        raise ValueError(f"{found[0]!r} in {around!r} cannot be stored")
    return text


def storable(text: str) -> str:
    """Return a text with underscores for what a document cannot hold."""
    return _IMPOSSIBLE.sub("_", text)


def to_bytes(root: Element) -> bytes:
    """Return the bytes of a document, the same for equal documents.

    :raise ValueError: for a text that a document cannot hold; see `check_text`.
    """
    lines = ['<?xml version="1.0" encoding="utf-8"?>']
    _write(root, "", lines)
    return (check_text("\n".join(lines)) + "\n").encode()


def _write(element: Element, indent: str, lines: list[str]) -> None:
    start = f"{indent}<{element.tag}"
    for name, value in element.attributes.items():
        start += f' {name}="{_escape(value, _IN_ATTRIBUTE)}"'
    if element.children:
        lines.append(f"{start}>")
        for child in element.children:
            _write(child, indent + _INDENT, lines)
        lines.append(f"{indent}</{element.tag}>")
    elif element.text:
        text = _escape(element.text, _IN_TEXT)
        lines.append(f"{start}>{text}</{element.tag}>")
    else:
        lines.append(f"{start}/>")


def _escape(text: str, table: dict[int, str]) -> str:
    return text.translate(table) if _SPECIAL.search(text) else text


def parse(data: bytes, path: Path) -> Element:
    """Return the root element of a document.

    :param data: the bytes of the file.
    :param path: the file, for errors.
    :raise StoreFormatError: says what is wrong and where.
    """
    return _Parser(path).parse(data)


class _Parser:
    def __init__(self, path: Path) -> None:
        self._path = path
        #: The elements that the parser is in; the first one holds the root.
        self._open = [Element("")]
        self._count = 0
        # What the document says of its encoding does not count: we write UTF-8.
        self._expat = expat.ParserCreate("utf-8")
        self._expat.buffer_text = True
        self._expat.StartElementHandler = self._start
        self._expat.EndElementHandler = self._end
        self._expat.CharacterDataHandler = self._text
        self._expat.StartDoctypeDeclHandler = lambda *_args: self._refuse(
            "a document type declaration is not accepted"
        )

    def parse(self, data: bytes) -> Element:
        if len(data) > _MOST_BYTES:
            self._refuse(f"it has more than {_MOST_BYTES} bytes")
        try:
            self._expat.Parse(data, True)
        except expat.ExpatError as error:
            reason = f"this is not XML: {expat.ErrorString(error.code)}"
            raise StoreFormatError(
                self._path, error.lineno, error.offset + 1, reason
            ) from error
        return self._open[0].children[0]

    def _refuse(self, reason: str) -> NoReturn:
        line, column = self._position()
        raise StoreFormatError(self._path, line, column, reason)

    def _position(self) -> tuple[int, int]:
        return self._expat.CurrentLineNumber, self._expat.CurrentColumnNumber + 1

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        self._count += 1
        if self._count > _MOST_ELEMENTS or len(self._open) > _MOST_DEPTH:
            self._refuse("there are too many elements, or too many in each other")
        line, column = self._position()
        element = Element(tag, attributes, line=line, column=column)
        self._open[-1].children.append(element)
        self._open.append(element)

    def _text(self, text: str) -> None:
        self._open[-1].text += text

    def _end(self, tag: str) -> None:
        element = self._open.pop()
        if element.children:
            if element.text.strip():
                self._refuse(f"element {tag!r} has text beside its elements")
            element.text = ""
