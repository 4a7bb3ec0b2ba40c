"""The programs of Debian templates, run on the host as their guests would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qubes_itests.guest.image import debian

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ROOT = Path(debian.__file__).parent / "root"


def command(name: str, *arguments: str) -> list[str]:
    """Return the command line of a guest's program.

    :param name: its path in the guest, without the first slash.
    """
    path = ROOT / name
    words = path.read_text().partition("\n")[0].removeprefix("#!").split()
    if words[0].endswith("python3"):
        words[0] = sys.executable
    return [*words, str(path), *arguments]


def run(
    name: str,
    arguments: Sequence[str] = (),
    data: bytes = b"",
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Run a guest's program to its end."""
    return subprocess.run(
        command(name, *arguments),
        input=data,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        timeout=300,
        check=False,
    )
