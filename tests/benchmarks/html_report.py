"""How large report.html of a large run is, and how long a browser takes for it.

Run: ``.venv/bin/python tests/benchmarks/html_report.py [TESTS [VMS [CALLS]]]``

Chromium opens it from a file, without a window; times are as a person waits: to the
list of tests, to the time line of a test, to the filtered list, to a filtered range.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from bench import heading, row, seconds

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import timeline_samples
from report_reader import Reader, browser

from qubes_itests.html_report.page import write_report

ROUNDS = 5


def until_drawn(reader, code):
    """Return the seconds that a page takes to do something and to draw it."""
    start = time.perf_counter()
    reader.browser.execute_async_script(
        f"{code}; const done = arguments[0];"
        "requestAnimationFrame(() => setTimeout(done))"
    )
    return time.perf_counter() - start


def main(tests=500, vms=8, calls=60):
    with tempfile.TemporaryDirectory() as place, browser(Path(place, "user")) as opened:
        directory = Path(place, "artifacts")
        directory.mkdir()
        timeline_samples.write(directory, tests, vms, calls=calls)
        written = sum(p.stat().st_size for p in directory.rglob("timeline.jsonl"))
        records = sum(p.read_bytes().count(b"\n") for p in directory.rglob("*.jsonl"))
        heading(f"{tests} tests of {vms} VMs, {records:,} records")
        row("timelines", [written / (1 << 20)], "MiB")
        before = time.process_time()
        page = write_report(directory)
        row("write the page, CPU time", [time.process_time() - before])
        row("size of the page", [page.stat().st_size / (1 << 20)], "MiB")
        reader = Reader(opened, page)
        row("open it", [seconds(reader.open) for _ in range(ROUNDS)])
        words = ["TC_0", "TC_07 test_03", "client rve", "nothing", ""]
        code = (
            "const box = document.getElementById('words'); box.value = {!r};"
            "box.dispatchEvent(new Event('input'))"
        )
        filtered = [until_drawn(reader, code.format(text)) for text in words]
        row("filter the tests", [taken * 1000 for taken in filtered], "ms")
        times = []
        for number in range(ROUNDS):
            start = time.perf_counter()
            reader.press("j")
            reader.until(lambda n=number: reader.all(f"#tests-{n}[aria-selected=true]"))
            reader.until(lambda: reader.all(".lanes text.name, main > .note"))
            times.append(time.perf_counter() - start)
        row("show the next test", [taken * 1000 for taken in times], "ms")
        key = "new KeyboardEvent('keydown', {key: 'ArrowLeft', shiftKey: true})"
        select = f"document.querySelector('.handle.end').dispatchEvent({key})"
        moved = [until_drawn(reader, select) for _ in range(ROUNDS)]
        row("select a range", [taken * 1000 for taken in moved], "ms")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
