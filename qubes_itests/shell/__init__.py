"""An interactive shell in a VM, on this process's terminal."""

from __future__ import annotations

from .session import WAY_OUT, open_session, open_shell
from .terminal import require_terminal

__all__ = [
    "WAY_OUT",
    "open_session",
    "open_shell",
    "require_terminal",
]
