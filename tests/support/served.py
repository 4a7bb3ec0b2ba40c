"""A server, ``python -m qubes_itests serve``, that is ready when its block begins."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from admin_client import Client

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

READY_TIMEOUT = 600
END_TIMEOUT = 300


class Served:
    """A context manager; leaving it ends the server if it still runs.

    :param environment: in which it is started.
    :param arguments: of ``serve``.
    """

    def __init__(self, environment: Mapping[str, str], *arguments: object) -> None:
        self.environment = dict(environment)
        self.arguments = [str(word) for word in arguments]
        self.said: list[str] = []
        self.process: subprocess.Popen[str]

    def __enter__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "qubes_itests", "serve", *self.arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        timer = threading.Timer(READY_TIMEOUT, self.process.kill)
        timer.start()
        for line in self._lines():
            if "Ctrl-C" in line:
                break
        timer.cancel()
        assert "ready\n" in self.said, "".join(self.said)
        return self

    def __exit__(self, *_exc):
        self.end()

    def _lines(self) -> Iterator[str]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line)
            yield line

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, and return the exit status; again without effect."""
        if self.process.returncode is None:
            self.process.send_signal(number)
            try:
                self.process.wait(END_TIMEOUT)
            except subprocess.TimeoutExpired:
                self.process.kill()
                raise
            assert self.process.stdout is not None
            self.said += self.process.stdout
            self.process.stdout.close()
        return self.process.returncode

    @property
    def socket(self) -> Path:
        (line,) = (line for line in self.said if line.startswith("  socket "))
        return Path(line.split()[1])

    @property
    def state(self) -> Path:
        (line,) = (line for line in self.said if line.startswith("  state "))
        return Path(line.split()[1])

    @property
    def client(self) -> Client:
        return Client(self.socket, timeout=300)

    def command(self, *words: object) -> list[str | bytes]:
        """Return the command line that calls ``qrexec-client``."""
        program = self.socket.with_name("bin") / "qrexec-client"
        return [str(program), *(w if isinstance(w, bytes) else str(w) for w in words)]

    def run(
        self, *words: object, data: bytes = b"", timeout: float = 300
    ) -> subprocess.CompletedProcess[bytes]:
        """Run ``qrexec-client`` to its end."""
        return subprocess.run(
            self.command(*words),
            input=data,
            capture_output=True,
            timeout=timeout,
            check=False,
        )

    def import_volume(self, vm, volume, data, method="ImportWithSize"):
        """Run the program that client tools import volumes with."""
        name = f"admin.vm.volume.{method}"
        return subprocess.run(
            [self.socket.with_name("qubes-rpc") / name, volume],
            input=data,
            env=os.environ | {"QREXEC_REQUESTED_TARGET": vm},
            stdout=subprocess.PIPE,
            timeout=300,
            check=True,
        ).stdout
