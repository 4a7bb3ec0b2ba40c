"""Sections that a CI's log viewer can fold."""

from __future__ import annotations

import os
import re
import time
from typing import TYPE_CHECKING

from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Folding"]


class Folding:
    """Writes the marks that begin and end a section; outside a CI, nothing.

    :param write: writes one line.
    :param environment: tells which CI this is.
    """

    def __init__(
        self, write: Callable[[str], None], environment: Mapping[str, str] = os.environ
    ) -> None:
        self._write = write
        self._github = environment.get("GITHUB_ACTIONS") == "true"
        self._gitlab = environment.get("GITLAB_CI") == "true"
        self._open = ""

    def begin(self, title: str) -> None:
        """Begin a section, and end the one before."""
        self.end()
        title = safe_text(title)
        self._open = re.sub(r"[^A-Za-z0-9_]", "_", title) or "section"
        if self._github:
            self._write(f"::group::{title}")
        elif self._gitlab:
            start = f"section_start:{int(time.time())}:{self._open}"
            self._write(f"\033[0K{start}[collapsed=true]\r\033[0K{title}")

    def end(self) -> None:
        """End the section that is open, if one is."""
        if self._open and self._github:
            self._write("::endgroup::")
        elif self._open and self._gitlab:
            name, now = self._open, int(time.time())
            self._write(f"\033[0Ksection_end:{now}:{name}\r\033[0K")
        self._open = ""
