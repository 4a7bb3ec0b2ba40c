"""The end of a test's time, said by the test: of one that hangs, in a run of a test.

Such a run limits its tests to what a slow machine needs; nobody waits for that.
"""

import signal
from types import MethodType

from qubes_itests.pytest_plugin.deadline import Deadline


def is_nearly_over(seconds: float = 1.0) -> None:
    """Have the time of the test that calls this be over in a moment.

    :param seconds: until then, for the test to be where it hangs.
    """
    handler = signal.getsignal(signal.SIGALRM)
    assert isinstance(handler, MethodType)
    deadline = handler.__self__
    assert isinstance(deadline, Deadline)
    deadline.end_in(seconds)
