"""What the host itself has a guest do: within a deadline, and with a short answer.

Everything that the harness calls in a guest of its own accord goes through here.  A
guest that never answers, or that answers for ever, costs what this allows and no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from qubes_itests.exc import DeadlineError
from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from qubes_itests.guest.link.process import GuestProcess

__all__ = ["LONGEST_ANSWER", "Answer", "answer_of"]

#: Bytes of each output: what is asked for here is said in a few lines.
LONGEST_ANSWER: Final = 65_536
#: Of what a guest said when its time was up, so many characters are shown.
_EVIDENCE: Final = 500


@dataclass(frozen=True, slots=True)
class Answer:
    """How a command or service ended, and all that it wrote.

    :param status: as `GuestProcess.returncode`.
    """

    status: int
    stdout: bytes
    stderr: bytes

    def check(self, command: str) -> Answer:
        """Return this; CalledProcessError when the status is not 0.

        :param command: what the error names.
        """
        if self.status:
            raise subprocess.CalledProcessError(
                self.status, command, self.stdout, self.stderr
            )
        return self


async def answer_of(
    process: GuestProcess,
    what: str,
    *,
    timeout: float,
    input: bytes = b"",  # noqa: A002 - as `GuestProcess.communicate` has it
    limit: int = LONGEST_ANSWER,
) -> Answer:
    """See a command or service through; it is killed unless it ends by itself.

    :param process: just started, with both outputs to be read.
    :param what: what the guest is to do, in words that follow "to".
    :param timeout: seconds.
    :param input: what it reads.
    :param limit: bytes that it may write to each output.
    :raise DeadlineError: it has not ended in time.
    :raise GuestError: it wrote more than that, or the guest went away.
    """
    try:
        async with asyncio.timeout(timeout):
            stdout, stderr = await process.communicate(input, limit=limit)
            status = await process.wait()
    except TimeoutError:
        said = bytes((process.taken[1] or process.taken[0])[-_EVIDENCE:])
        raise DeadlineError(
            f"answer of VM {process.vm}, which was to {what},",
            timeout,
            safe_text(said.strip(), lines=True),
        ) from None
    finally:
        # also when it only left something behind that goes on writing
        process.hang_up()
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    return Answer(status, stdout or b"", stderr or b"")
