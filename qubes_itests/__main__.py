"""The program ``itests``, which is ``python -m qubes_itests`` as well."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback

__all__ = ["main"]

#: Seconds that threads have to end, which Python waits for at the end of a process.
_LONGEST = 5.0


def main() -> int:
    """Run the command line of this process, and return its exit status."""
    from qubes_itests.cli import command_line  # noqa: PLC0415 - see its docstring

    status = command_line(sys.argv[1:])
    # A test may have left one that hangs, as in a driver that calls asyncio.to_thread.
    threading.Thread(target=_end, args=[status], name="end", daemon=True).start()
    return status


def _end(status: int) -> None:
    """End the process without what does not end by itself."""
    time.sleep(_LONGEST)
    frames = sys._current_frames()  # noqa: SLF001 - there is no other way
    for thread in threading.enumerate():
        frame = frames.get(thread.ident or 0)
        if not thread.daemon and thread is not threading.main_thread() and frame:
            place = traceback.format_stack(frame)[-1].strip()
            sys.stderr.write(f"{thread.name} hangs, and is not waited for: {place}\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
