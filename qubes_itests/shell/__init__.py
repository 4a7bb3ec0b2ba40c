"""An interactive shell in a VM, on this process's terminal."""

from __future__ import annotations

from .session import NoTerminalError, open_shell, require_terminal

__all__ = ["NoTerminalError", "open_shell", "require_terminal"]
