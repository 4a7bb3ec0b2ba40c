"""Rate of this machine's time-stamp counter, which emulated CPUs have for theirs."""

from __future__ import annotations

import ctypes
import mmap
import platform
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["tsc_rate"]

#: rdtsc; shl rdx, 32; or rax, rdx; ret. Python has no other way to the counter.
_READ: Final = bytes.fromhex("0f31 48c1e220 4809d0 c3")
_PROTECTION: Final = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
#: Seconds between two looks, and of how many each is the best.
_PAUSE: Final = 0.02
_TRIES: Final = 20
#: kHz. Coarse, so that each run finds the same: it is in the keys of saved states.
_STEP: Final = 5000


def tsc_rate() -> int | None:
    """Measure the rate in kHz, to a quarter of a per cent. Blocking, for 20 ms.

    :return: None where it cannot be.
    """
    if platform.machine() != "x86_64":
        return None
    try:
        code = mmap.mmap(-1, mmap.PAGESIZE, prot=_PROTECTION)
    except OSError:  # some security policies forbid such memory
        return None
    with code:
        code.write(_READ)
        place = ctypes.c_char.from_buffer(code)
        read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(place))
        begin, first = _look(read)
        time.sleep(_PAUSE)
        end, last = _look(read)
        del place  # which would keep the memory
    return round((last - first) * 10**6 / (end - begin) / _STEP) * _STEP


def _look(read: Callable[[], int]) -> tuple[int, int]:
    """Return a time in nanoseconds, and the counter then."""
    tries = [(time.monotonic_ns(), read(), time.monotonic_ns()) for _ in range(_TRIES)]
    before, count, after = min(tries, key=lambda one: one[2] - one[0])
    return (before + after) // 2, count
