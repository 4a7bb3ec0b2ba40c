"""The errors of the test interface.

::

    HarnessError
     +-- LeakError    a test left something behind (also an AssertionError)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qubes_itests.exc import HarnessError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["LeakError"]


class LeakError(HarnessError, AssertionError):
    """A test left something behind; an AssertionError, so that it fails.

    :param leaks: one sentence for each thing.
    """

    def __init__(self, leaks: Sequence[str]) -> None:
        listed = "".join(f"\n- {leak}" for leak in leaks)
        super().__init__(f"the test left something behind:{listed}")
        self.leaks = tuple(leaks)
