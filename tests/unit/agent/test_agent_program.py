"""What the guest's program is made of, as readelf(1) tells it."""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING

import pytest
from agent_process import build

if TYPE_CHECKING:
    from pathlib import Path


def readelf(what: str, program: Path) -> str:
    command = ["readelf", "--wide", what, str(program)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the program of guests, with its symbols."""
    directory = tmp_path_factory.mktemp("program")
    build("all", directory, "STRIP=")
    return directory / "agent"


def test_it_lies_anywhere_and_needs_no_loader(program: Path) -> None:
    assert re.search(r"Type: +DYN", readelf("--file-header", program))
    assert "INTERP" not in readelf("--program-headers", program)
    assert re.search(r"FLAGS_1.*\bPIE\b", readelf("--dynamic", program))


def test_nothing_can_be_written_that_is_not_data(program: Path) -> None:
    segments = readelf("--program-headers", program)
    flags = dict(
        re.findall(r"^ +(GNU_STACK|GNU_RELRO) .* (R[W ][E ])", segments, re.MULTILINE)
    )
    assert flags == {"GNU_STACK": "RW ", "GNU_RELRO": "R  "}
    assert not re.search(r"^ +LOAD .* RWE", segments, re.MULTILINE)
    assert "BIND_NOW" in readelf("--dynamic", program)


def test_overruns_are_noticed(program: Path) -> None:
    switches = readelf("--string-dump=.GCC.command.line", program)
    assert "-fstack-protector-strong" in switches
    symbols = readelf("--symbols", program)
    assert {"__snprintf_chk", "__memcpy_chk"} <= set(symbols.split())
