"""The network devices of the run, as the host sees them."""

from __future__ import annotations

import contextlib
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def links() -> set[str]:
    """Return the names of the network devices of the run."""
    done = subprocess.run(
        ["ip", "-oneline", "link"], check=True, capture_output=True, text=True
    )
    return {line.split(": ")[1] for line in done.stdout.splitlines()}


@contextlib.contextmanager
def bridge() -> Iterator[str]:
    """Yield the name of a bridge that leads nowhere."""
    subprocess.run(["ip", "link", "add", "qi-none", "type", "bridge"], check=True)
    try:
        yield "qi-none"
    finally:
        subprocess.run(["ip", "link", "delete", "qi-none"], check=True)
