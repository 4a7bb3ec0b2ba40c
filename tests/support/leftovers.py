"""What a run has left on the machine, told by the path of its cache."""

from __future__ import annotations

import time
from pathlib import Path


def leftovers(cache: Path) -> list[str]:
    """Return what is there of runs with a cache, and loop devices over lost files.

    Processes are told by what is mounted for them: their names for it are their own.
    """
    processes = [
        f"process {path.parent.name}: {_text(path.with_name('cmdline'))[:200]}"
        for path in Path("/proc").glob("[0-9]*/mountinfo")
        if f"{cache.name}/runs/" in _text(path)
    ]
    loops = [
        f"loop device {path.parent.parent.name} over {_text(path)}"
        for path in Path("/sys/block").glob("loop*/loop/backing_file")
        if "(deleted)" in _text(path)
    ]
    directories = [
        f"directory {path}" for path in (cache / "runs").glob("*") if path.is_dir()
    ]
    return processes + loops + directories


def wait_for_no_leftovers(cache: Path, timeout: float = 10.0) -> list[str]:
    """Return what is left, if something still is after some seconds."""
    deadline = time.monotonic() + timeout
    while (left := leftovers(cache)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace").replace("\0", " ")
    except OSError:  # it has gone
        return ""
