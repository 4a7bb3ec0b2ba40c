"""Picture of a timeline: who held how much memory, when, and why it changed.

An SVG of our own, without any plotting library: it is drawn in the main job, after a
test has failed, and must open in every browser years later.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from html import escape
from typing import TYPE_CHECKING

from qubes_itests.qmemman.sizes import MIB, mib

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from qubes_itests.qmemman.timeline import DomainRecord, Record

__all__ = ["draw", "draw_rows"]

_WIDTH, _LEFT, _RIGHT, _TOP = 1000, 70, 170, 66
_STACK, _ROW, _GAP, _LINE = 300, 80, 18, 14
#: Lines of text about events; what finds no place has its mark and a tooltip.
_MOST_LINES = 4
#: Told apart by people with colour blindness too (Okabe and Ito).
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#B8A800")
_DOM0_COLOUR, _FREE_COLOUR = "#8a8a8a", "#e4efe0"
#: Among more records than this nobody sees a difference.
_MOST_POINTS = 1500
_MOST_ROWS = 12
_EVENTS = {"granted": "#1a7f37", "refused": "#c00000", "note": "#333333"}
_STYLE = """
text { font: 12px sans-serif; fill: #222 } .small { font-size: 11px; fill: #555 }
.title { font-size: 16px; font-weight: bold } .axis { stroke: #999; fill: none }
.grid { stroke: #ddd } .line { fill: none; stroke-width: 1.6 }
"""


@dataclass(frozen=True)
class _Frame:
    """From times and sizes to places in one panel."""

    records: Sequence[Record]
    top: float
    height: float
    most: int

    def x(self, time: float) -> float:
        start, end = self.records[0].time, self.records[-1].time
        share = (time - start) / (end - start) if end > start else 0
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, size: float) -> float:
        share = min(max(size / self.most, 0), 1) if self.most else 0
        return self.top + self.height * (1 - share)

    def steps(self, value: Callable[[Record], int | None]) -> str:
        """Return the path of a value that stays until the next record."""
        words: list[str] = []
        before: str | None = None
        for record in self.records:
            size = value(record)
            x = f"{self.x(record.time):.1f}"
            y = None if size is None else f"{self.y(size):.1f}"
            if y != before or record is self.records[-1]:
                words.append(f"H{x}" if before else f"M{x} {y}" if y else "")
                words.append(f"V{y}" if before and y else "")
            before = y
        return "".join(words)

    def corners(self, values: dict[int, int]) -> list[tuple[str, str]]:
        """Return where a value that stays until the next record changes, and its end.

        :param values: by the index of the record.
        """
        found: list[tuple[str, str]] = []
        for number, record in enumerate(self.records):
            y = f"{self.y(values[number]):.1f}"
            if not found or y != found[-1][1]:
                found.append((f"{self.x(record.time):.1f}", y))
        return [*found, (f"{self.x(self.records[-1].time):.1f}", found[-1][1])]


def draw(records: Sequence[Record], title: str = "Who holds the memory") -> str:
    """Return a timeline as the text of an SVG file.

    :param records: in order of time; none gives a picture that says so.
    :param title: its heading.
    """
    return draw_rows([[(title, records)]])


def draw_rows(rows: Sequence[Sequence[tuple[str, Sequence[Record]]]]) -> str:
    """Return timelines as the text of one SVG file.

    :param rows: of titles with timelines, from top to bottom; those of a row are drawn
        side by side, to the same scales.
    """
    body: list[str] = []
    top = 0.0
    for row in rows:
        ends = [records[-1].time - records[0].time for _, records in row if records]
        sizes = _largest([records for _, records in row])
        height = 0.0
        for column, (title, records) in enumerate(row):
            bottom, panel = _panel(_until(records, max(ends, default=0)), title, sizes)
            height = max(height, bottom)
            move = f'transform="translate({_WIDTH * column} {top:.0f})"'
            body += [f"<g {move}>", *panel, "</g>"]
        top += height
    width = _WIDTH * max(map(len, rows))
    size = f'width="{width}" height="{top:.0f}" viewBox="0 0 {width} {top:.0f}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
            f"<style>{_STYLE}</style>",
            '<rect width="100%" height="100%" fill="white"/>',
            *body,
            "</svg>\n",
        ]
    )


def _until(records: Sequence[Record], length: float) -> Sequence[Record]:
    """Return a timeline that is so many seconds long: what was last stays."""
    if not records or records[-1].time - records[0].time >= length:
        return records
    return [*records, replace(records[-1], event="look", time=records[0].time + length)]


def _largest(timelines: Sequence[Sequence[Record]]) -> dict[str, int]:
    """Return the largest size that is shown of each VM, bytes."""
    sizes: dict[str, int] = {}
    for record in itertools.chain.from_iterable(timelines):
        for name, domain in ((d.name, d) for d in record.domains.values()):
            shown = (domain.actual, domain.target, domain.preferred or 0)
            sizes[name] = max(sizes.get(name, 0), *shown)
    return sizes


def _panel(
    records: Sequence[Record], title: str, sizes: dict[str, int]
) -> tuple[float, list[str]]:
    """Return the height of a timeline's picture, and its elements."""
    if not records:
        return 80, ['<text x="20" y="40">Nothing was recorded.</text>']
    thin = _thinned(records)
    names = _names(thin)
    shown = list(names)[:_MOST_ROWS]
    stack = _Frame(thin, _TOP, _STACK, max(record.total for record in thin))
    marks, lines = _events(stack)
    bottom = _TOP + _STACK + 31 + _LINE * lines
    end = bottom + 34 + len(shown) * (_ROW + _GAP) - _GAP
    body = [
        f'<text x="{_LEFT}" y="26" class="title">{escape(title)}</text>',
        (
            f'<text x="{_LEFT}" y="44" class="small">A machine of {mib(thin[-1].total)}'
            f" over {thin[-1].time - thin[0].time:.0f} seconds</text>"
        ),
        *_stack(stack, names),
        *marks,
        # the events' lines again, faintly, across the rows of VMs
        *(
            f'<path d="M{stack.x(record.time):.1f} {bottom + 24}V{end}"'
            f' stroke="{colour}" stroke-opacity="0.25"/>'
            for record in thin
            if (colour := _EVENTS.get(record.event))
        ),
    ]
    top = bottom + 34
    body.append(
        _label(
            _LEFT,
            top - 18,
            "Each VM: shaded what it uses, solid what it holds, black its target,"
            " dotted what it prefers.",
        )
    )
    for domid in shown:
        body += _row(thin, domid, names, top, sizes[names[domid]])
        top += _ROW + _GAP
    if len(names) > len(shown):
        body.append(
            f'<text x="{_LEFT}" y="{top}">{len(names) - len(shown)} more VMs</text>'
        )
    return top + 24, body


def _thinned(records: Sequence[Record]) -> list[Record]:
    every = max(1, len(records) // _MOST_POINTS)
    last = len(records) - 1
    return [
        record
        for number, record in enumerate(records)
        if number % every == 0 or record.event in _EVENTS or number == last
    ]


def _names(records: Sequence[Record]) -> dict[str, str]:
    return {
        domid: domain.name
        for record in records
        for domid, domain in record.domains.items()
    }


def _colour(domid: str, names: dict[str, str]) -> str:
    if domid == "0":
        return _DOM0_COLOUR
    vms = [each for each in names if each != "0"]
    return _COLOURS[vms.index(domid) % len(_COLOURS)]


def _stack(frame: _Frame, names: dict[str, str]) -> Iterator[str]:
    yield from _axes(frame, 4)
    yield from _times(frame)
    yield _label(_LEFT - 8, frame.top - 10, "MiB", "end")
    bottom: dict[int, int] = dict.fromkeys(range(len(frame.records)), 0)
    right = _WIDTH - _RIGHT + 10
    labels: list[tuple[float, str, str]] = []
    for domid, name in names.items():
        low, bottom = bottom, dict(bottom)
        for number, record in enumerate(frame.records):
            if domain := record.domains.get(domid):
                bottom[number] += domain.current
        colour = _colour(domid, names)
        yield _area(frame, low, bottom, colour)
        end = len(frame.records) - 1
        if bottom[end] > low[end]:
            held = f"{name} {mib(bottom[end] - low[end])}"
            labels.append((frame.y((bottom[end] + low[end]) / 2), held, colour))
    full = {number: record.total for number, record in enumerate(frame.records)}
    yield _area(frame, bottom, full, _FREE_COLOUR)
    end = len(frame.records) - 1
    free = full[end] - bottom[end]
    labels.append((frame.y(bottom[end] + free / 2), f"free {mib(free)}", "#4d7a40"))
    yield from _apart(labels, right)


def _area(
    frame: _Frame,
    low: dict[int, int],
    high: dict[int, int],
    colour: str,
    opacity: float = 0.85,
) -> str:
    """Return the band between two stacks, in steps."""
    upper, lower = frame.corners(high), frame.corners(low)
    there = "".join(f"H{x}V{y}" for x, y in upper[1:])
    pairs = zip(lower[-2:0:-1], lower[-3::-1], strict=True)
    back = "".join(f"H{x}V{before}" for (x, _), (_, before) in pairs)
    path = f"M{upper[0][0]} {upper[0][1]}{there}V{lower[-1][1]}{back}H{upper[0][0]}Z"
    return f'<path d="{path}" fill="{colour}" fill-opacity="{opacity}"/>'


def _apart(labels: list[tuple[float, str, str]], x: float) -> Iterator[str]:
    """Yield labels beside their bands, moved until none hides another."""
    lowest = 0.0
    for y, text, colour in sorted(labels):
        lowest = max(y, lowest + 15)
        yield (
            f'<text x="{x}" y="{lowest + 4:.1f}" style="fill:{colour};'
            f'font-weight:bold">{escape(text)}</text>'
        )


def _axes(frame: _Frame, parts: int) -> Iterator[str]:
    right = _WIDTH - _RIGHT
    step = _round(frame.most / MIB / parts) * MIB
    size = 0
    while size <= frame.most:
        y = frame.y(size)
        yield f'<path class="grid" d="M{_LEFT} {y:.1f}H{right}"/>'
        yield _label(_LEFT - 8, y + 4, f"{size // MIB}", "end")
        size += step


def _times(frame: _Frame) -> Iterator[str]:
    start, end = frame.records[0].time, frame.records[-1].time
    step = _round((end - start) / 8)
    y = frame.top + frame.height
    passed = 0
    while passed <= end - start:
        yield _label(frame.x(start + passed), y + 16, f"{passed} s", "middle")
        passed += step


def _round(value: float) -> int:
    """Return the next of 1, 2, 5, 10, 20, 50 ..."""
    power = 1
    while True:
        for factor in (1, 2, 5):
            if factor * power >= value:
                return factor * power
        power *= 10


def _label(x: float, y: float, text: str, anchor: str = "start") -> str:
    return (
        f'<text class="small" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
        f"{escape(text)}</text>"
    )


def _events(frame: _Frame) -> tuple[list[str], int]:
    """Return marks for what explains a change, and how many lines of text they take."""
    taken = [0.0] * _MOST_LINES
    marks = []
    for record in frame.records:
        colour = _EVENTS.get(record.event)
        if colour is None:
            continue
        text = record.text or f"{mib(record.amount)} {record.event}"
        x, bottom = frame.x(record.time), frame.top + frame.height
        length = 6.2 * len(text)
        place = min(x, _WIDTH - _RIGHT - length)
        marks.append(
            f'<path d="M{x:.1f} {frame.top}V{bottom}" stroke="{colour}"'
            f' stroke-dasharray="4 3"><title>{escape(text)}</title></path>'
        )
        line = next((n for n, until in enumerate(taken) if until < place), None)
        if line is not None:
            taken[line] = place + length + 8
            marks.append(
                f'<text class="small" x="{place:.1f}" y="{bottom + 31 + _LINE * line}"'
                f' style="fill:{colour}">{escape(text)}</text>'
            )
    return marks, sum(until > 0 for until in taken)


def _row(
    records: Sequence[Record],
    domid: str,
    names: dict[str, str],
    top: float,
    most: int,
) -> Iterator[str]:
    frame = _Frame(records, top, _ROW, int(most * 1.1) or 1)
    colour = _colour(domid, names)

    def steps(value: Callable[[DomainRecord], int | None]) -> str:
        def of(record: Record) -> int | None:
            domain = record.domains.get(domid)
            # a target of 0 was never set
            return (domain and value(domain)) or None

        return frame.steps(of)

    yield from _axes(frame, 2)
    there = [record.domains.get(domid) for record in records]
    used = {n: (domain and domain.used) or 0 for n, domain in enumerate(there)}
    yield _area(frame, dict.fromkeys(used, 0), used, colour, 0.3)
    for line, style in (
        (steps(lambda d: d.preferred), f"stroke:{colour};stroke-dasharray:2 3"),
        (steps(lambda d: d.current), f"stroke:{colour};stroke-width:2.4"),
        (steps(lambda d: d.target), "stroke:#000;stroke-width:1"),
    ):
        yield f'<path class="line" style="{style}" d="{line}"/>'
    yield from _said(records, domid, frame, names[domid], colour)


def _said(
    records: Sequence[Record], domid: str, frame: _Frame, name: str, colour: str
) -> Iterator[str]:
    """Yield the words beside a row: its last state, and whether it was marked."""
    x, seen = (
        _WIDTH - _RIGHT + 10,
        [r.domains[domid] for r in records if domid in r.domains],
    )
    last = seen[-1]
    ended = domid not in records[-1].domains
    silent = "has not reported" if last.balanced else "takes no part"
    lines = [
        silent if last.used is None else f"uses {mib(last.used)}",
        f"holds {mib(last.current)}",
        f"target {mib(last.target)}",
    ]
    flags = {
        "did not give memory": any(d.no_progress for d in seen),
        "gave memory slowly": any(d.slow_memset_react for d in seen),
        "was paused": any(d.paused for d in seen),
        "has ended": ended,
    }
    lines += [text for text, true in flags.items() if true]
    yield (
        f'<text x="{x}" y="{frame.top + 12}" style="fill:{colour};font-weight:bold">'
        f"{escape(name)}</text>"
    )
    for number, text in enumerate(lines):
        yield _label(x, frame.top + 28 + 14 * number, text)
