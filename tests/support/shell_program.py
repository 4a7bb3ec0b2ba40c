"""A shell in a guest that is an ordinary process: ``shell_program.py AGENT ROOT``."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from pathlib import Path

from agent_process import AgentProcess
from guest_peer import SocketDomain

from qubes_itests.guest.link.agent import GuestAgent
from qubes_itests.host import sandbox
from qubes_itests.portal import Portal
from qubes_itests.shell import open_shell


async def connect(root: AgentProcess) -> tuple[GuestAgent, asyncio.subprocess.Process]:
    ours, theirs = socket.socketpair()
    process = await asyncio.create_subprocess_exec(
        root.program,
        str(theirs.fileno()),
        pass_fds=[theirs.fileno()],
        env=root.environment,
        stdin=asyncio.subprocess.DEVNULL,
        # as a guest: the keys of the terminal are none of its own
        start_new_session=True,
    )
    theirs.close()
    (root.root / "pid").write_text(str(process.pid))
    domain = SocketDomain("guest", ours, root.root / "console")
    agent = await GuestAgent.connect(domain, timeout=300)  # type: ignore[arg-type]
    return agent, process


async def disconnect(agent: GuestAgent, process: asyncio.subprocess.Process) -> None:
    await agent.close()
    # Its event loop kills it in the end, and what it has not killed by then lives on.
    with contextlib.suppress(TimeoutError):  # it is stopped
        await asyncio.wait_for(process.wait(), 20)


def main(program: str, directory: str) -> int:
    root = AgentProcess(Path(program), Path(directory))
    uid, gid = os.getuid(), os.getgid()
    name = os.environ.get("USER_OF_GUEST", "root")
    root.file("etc/passwd", f"{name}:x:{uid}:{gid}::{root.home}:/bin/sh\n")
    with Portal() as portal:
        agent, process = portal.run(connect(root))
        try:
            return open_shell(portal, agent)
        finally:
            portal.run(disconnect(agent, process))


if __name__ == "__main__":
    with sandbox.interruptible():
        try:
            sys.exit(main(*sys.argv[1:]))
        except KeyboardInterrupt:
            sys.exit(2)
