"""What the VMs of a failed test have in them: journals, and files that apps declare.

Guests are hostile. What they send is bounded in bytes, number and time; their names of
files are shown in names of artefacts, and choose no path.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import shlex
import subprocess
from typing import TYPE_CHECKING, Final

from qubes_itests import timeline
from qubes_itests.core.exc import QubesException
from qubes_itests.exc import HarnessError
from qubes_itests.report.names import file_name, one_line

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence

    from qubes_itests.core.vm.qubesvm import QubesVM

__all__ = ["read_guests"]

#: Bytes of one file and of a journal, of which the guest sends the last, and of all
#: files of a VM.
_LONGEST: Final = 1 << 20
_ROOM: Final = 8 << 20
_MOST_FILES: Final = 32
#: Bytes of the list of files.
_LONGEST_LIST: Final = 64 << 10
#: Seconds for one VM: a failed test may have left guests that do not answer any more.
_TIMEOUT: Final = 30.0
_JOURNAL: Final = (
    f"journalctl --boot --no-pager --output=short-monotonic | tail -c {_LONGEST}"
)
#: What is no wildcard of a shell, and would have another meaning than itself.
_SPECIAL: Final = re.compile(r"[^\w./*?\[\]!-]")


async def read_guests(
    vms: Iterable[QubesVM], patterns: Sequence[str]
) -> tuple[dict[str, bytes], list[str]]:
    """Read journals and files of VMs, of all at once, for some seconds at most.

    The timeline of the test that runs gets the journals as well.

    :param vms: in any state.
    :param patterns: absolute paths in the guests, with wildcards of a shell.
    :return: what was read, by names for artefacts; and what was not, a sentence each.
    """
    files: dict[str, bytes] = {}
    problems: list[str] = []

    async def read(vm: QubesVM) -> None:
        try:
            # the test did not ask for any of this
            with timeline.unrecorded():
                async with asyncio.timeout(_TIMEOUT):
                    async for name, data in _parts(vm, patterns):
                        files[f"{file_name(vm.name)}.{name}"] = data
        except (
            HarnessError,
            QubesException,
            OSError,  # a time-out is one
            subprocess.CalledProcessError,
        ) as error:
            what = one_line(str(error)) or f"no answer within {_TIMEOUT:g} s"
            problems.append(f"journal and declared files of VM {vm.name}: {what}")

    await asyncio.gather(*map(read, vms))
    return files, problems


async def _parts(
    vm: QubesVM, patterns: Sequence[str]
) -> AsyncIterator[tuple[str, bytes]]:
    """Yield what a VM has: names and contents."""

    async def ask(command: str, limit: int) -> bytes:
        asked = vm.commands.ask(
            command, "show its files", timeout=_TIMEOUT, limit=limit
        )
        return (await asked)[0]

    init = vm.features.check_with_template("init", "agent")
    if vm.agent is not None and init == "systemd":
        yield "journal.txt", await ask(_JOURNAL, _LONGEST)
        if vm.life.journal is not None:
            await vm.life.journal.read(_TIMEOUT)
    if not patterns:
        return
    globs = " ".join(_SPECIAL.sub(r"\\\g<0>", pattern) for pattern in patterns)
    each = f"""for f in {globs}; do [ -f "$f" ] && printf '%s\\0' "$f"; done"""
    listed = await ask(f"{{ {each}; }} | head -c {_LONGEST_LIST}", _LONGEST_LIST)
    paths = listed.decode("utf-8", "replace").split("\0")[:-1]
    room, names = _ROOM, set[str]()
    for path in dict.fromkeys(paths[:_MOST_FILES]):
        if not (limit := min(_LONGEST, room)):
            raise HarnessError(f"{_ROOM >> 20} MiB of them are kept")
        # one that has gone meanwhile
        with contextlib.suppress(subprocess.CalledProcessError):
            data = await ask(f"tail -c {limit} -- {shlex.quote(path)}", limit)
            room -= len(data)
            # Never under the guest's own last name: a browser would run a page of it.
            end = ".bin" if b"\0" in data else ".txt"
            name = re.sub(r"[^A-Za-z0-9_.-]+", "_", path.strip("/"))[:100]
            name = file_name(path) if name in names else name
            names.add(name)
            yield f"file.{name}{end}", data
    if len(paths) > _MOST_FILES:
        raise HarnessError(f"{_MOST_FILES} of them are kept, of {len(paths)}")
