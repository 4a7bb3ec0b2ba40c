"""What a run has left on the machine, told by the path of its cache."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def leftovers(cache: Path) -> list[str]:
    """Return what is there of runs with a cache, and loop devices over lost files."""
    directories = [
        f"directory {path}" for path in (cache / "runs").glob("*") if path.is_dir()
    ]
    return processes(cache) + _loop_devices(cache) + directories


def processes(cache: Path) -> list[str]:
    """Return those of runs with a cache.

    They are told by what is mounted for them: their names for it are their own.
    """
    return [
        f"process {path.parent.name}: {_text(path.with_name('cmdline'))[:200]}"
        for path in Path("/proc").glob("[0-9]*/mountinfo")
        if f"{cache.name}/runs/" in _text(path)
    ]


def wait_for_no_leftovers(cache: Path, timeout: float = 300.0) -> list[str]:
    """Return what is left, if something still is after some seconds."""
    deadline = time.monotonic() + timeout
    while (left := leftovers(cache)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def _loop_devices(cache: Path) -> list[str]:
    """Return those over lost files, and over files of runs.

    By inode, for the name of a file is its own in each mount namespace.
    """
    files = {
        (f"{os.major(s.st_dev)}:{os.minor(s.st_dev)}", str(s.st_ino))
        for s in _files(cache / "runs")
    }
    return [
        f"loop device {device['name']} over {device['back-file']}"
        for device in _listed()
        if (str(device["back-maj:min"]).strip(), str(device["back-ino"])) in files
        or ("(deleted)" in str(device["back-file"]) and device not in _OF_OTHERS)
    ]


def _listed() -> list[dict[str, object]]:
    columns = "NAME,BACK-FILE,BACK-MAJ:MIN,BACK-INO"
    listed = subprocess.run(
        ["losetup", "--list", "--json", "--output", columns],
        check=True,
        capture_output=True,
    )
    devices: list[dict[str, object]] = json.loads(listed.stdout or "{}").get(
        "loopdevices", []
    )
    return devices


#: Those that other programs have left.
_OF_OTHERS = _listed()


def _files(root: Path) -> Iterator[os.stat_result]:
    # walk() passes over a directory that a live run removes meanwhile
    for place, _, names in os.walk(root):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                yield (Path(place) / name).stat()


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace").replace("\0", " ")
    except OSError:  # it has gone
        return ""
