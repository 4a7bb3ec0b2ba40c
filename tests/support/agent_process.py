"""The agent's sanitized build as an ordinary process, on a root of its own."""

from __future__ import annotations

import os
import socket
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from agent_wire import Wire

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

SOURCES = Path(__file__).parents[2] / "qubes_itests/guest/agent"


def build(target: str, directory: Path, *settings: str) -> None:
    """Compile the agent into a directory."""
    command = ["make", "-s", "-C", str(SOURCES), f"O={directory}", target, *settings]
    subprocess.run(command, check=True)


class AgentProcess:
    """One agent and the root directory that it takes for its guest's.

    :param program: the sanitized build.
    :param root: a new directory.
    """

    def __init__(self, program: Path, root: Path) -> None:
        self.program = program
        self.root = root
        self.home = root / "home"
        self.socket = root / "run/qubes/agent.sock"
        self.environment = os.environ | {
            "AGENT_PREFIX": str(root),
            "ASAN_OPTIONS": "detect_leaks=1:abort_on_error=0",
        }
        self._make_root()

    def _make_root(self) -> None:
        self.home.mkdir(parents=True)
        uid, gid = os.getuid(), os.getgid()
        self.file(
            "etc/passwd",
            f"root:x:0:0:root:{self.home}:/bin/sh\n"
            f"user:x:{uid}:{gid}:user:{self.home}:/bin/sh\n"
            f"noshell:x:{uid}:{gid}:user:{self.home}:/does/not/exist\n",
        )

    def file(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file below the root."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        target.chmod(mode)

    def service(self, name: str, body: str, mode: int = 0o755) -> None:
        """Install a service."""
        self.file(f"etc/qubes-rpc/{name}", f"#!/bin/sh\n{body}\n", mode)

    def client(
        self,
        name: str,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        stdin: int | socket.socket = subprocess.PIPE,
    ) -> subprocess.Popen[bytes]:
        """Start one of the programs that the guest calls."""
        return subprocess.Popen(
            [name, *arguments],
            executable=self.program,
            env=self.environment | dict(environment or {}),
            stdin=stdin if isinstance(stdin, int) else stdin.fileno(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    @contextmanager
    def start(self, *launcher: str) -> Iterator[Wire]:
        """Run it; on leaving, the connection is closed and it must have ended well.

        :param launcher: a command that executes what follows it.
        """
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                self.process = subprocess.Popen(
                    [*launcher, self.program, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    env=self.environment,
                    stderr=subprocess.PIPE,
                )
            try:
                yield Wire(ours)
                ours.close()
                self.stderr = self.process.communicate(timeout=300)[1].decode()
            finally:
                self.process.kill()
                self.process.communicate()
