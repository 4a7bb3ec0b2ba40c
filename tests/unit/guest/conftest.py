"""Fixtures: an agent whose guest the test plays, and one whose guest is our program."""

import asyncio
import socket

import pytest_asyncio
from agent_process import AgentProcess
from guest_peer import SocketDomain, connect_pair

from qubes_itests.guest.link.agent import GuestAgent


@pytest_asyncio.fixture
async def connect(tmp_path):
    """Connect agents to peers; all are closed at the end."""
    opened = []

    async def connect(name="vm", **kwargs):
        agent, peer = await connect_pair(tmp_path, name, **kwargs)
        opened.append((agent, peer))
        return agent, peer

    yield connect
    for agent, peer in opened:
        await agent.close()
        peer.close()


@pytest_asyncio.fixture
async def real(agent_program, tmp_path):
    """Start our guest program as a process, and connect an agent to it."""
    running = []

    async def start(name="vm", **kwargs):
        root = AgentProcess(agent_program, tmp_path / name)
        ours, theirs = socket.socketpair()
        process = await asyncio.create_subprocess_exec(
            agent_program,
            "--test-fd",
            str(theirs.fileno()),
            pass_fds=[theirs.fileno()],
            env=root.environment,
        )
        theirs.close()
        domain = SocketDomain(name, ours, tmp_path / f"{name}.console")
        agent = await GuestAgent.connect(domain, timeout=300, **kwargs)
        running.append((agent, process))
        return agent, root

    yield start
    for agent, process in running:
        await agent.close()
        assert await asyncio.wait_for(process.wait(), 300) == 0
