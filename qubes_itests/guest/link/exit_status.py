"""Exit statuses that qrexec itself gives a call, in place of the program's own.

https://www.qubes-os.org/doc/qrexec-internals/, and POSIX for what a shell returns.
"""

from __future__ import annotations

from typing import Final

__all__ = ["GONE", "NOT_FOUND", "REFUSED"]

#: Policy, or the agent, does not let it start.
REFUSED: Final = 126
#: There is no such command, service or user.
NOT_FOUND: Final = 127
#: The VM went away before the program had ended.
GONE: Final = 255
