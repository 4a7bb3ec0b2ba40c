"""A guest booted by QEMU alone: the agent as init, on disks of its own."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Any, TextIO

from agent_wire import ENTER, Wire, strings

if TYPE_CHECKING:
    from pathlib import Path

BOOT_TIMEOUT = 600.0
KERNEL_OPTIONS = (
    "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check mitigations=off"
    " random.trust_cpu=on 8250.nr_uarts=1 nokaslr"
)


def deadline_loop(what: str, timeout: float = 300.0) -> Any:
    """Yield until the caller breaks off; raise when it takes too long."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        yield
        time.sleep(0.02)
    raise TimeoutError(what)


class RawGuest:
    """One QEMU process and the connection to its agent.

    :param bus: how disks are attached: ``blk`` or ``scsi``.
    """

    def __init__(
        self,
        directory: Path,
        kernel: Path,
        initramfs: Path,
        disks: dict[str, Path],
        bus: str = "scsi",
    ) -> None:
        self.directory, self.bus, self.disks = directory, bus, disks
        self.console = directory / "console"
        command = [
            *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot"),
            *("-display", "none", "-machine", "q35", "-accel", "tcg"),
            *("-cpu", "max,-erms", "-m", "192"),
            *("-kernel", kernel, "-initrd", initramfs, "-append", KERNEL_OPTIONS),
            *("-serial", f"file:{self.console}", "-device", "virtio-serial-pci"),
            *("-chardev", f"socket,id=c,path={directory}/agent,server=on,wait=off"),
            *("-device", "virtserialport,chardev=c,name=org.qubes_itests.agent"),
            *("-qmp", f"unix:{directory}/qmp,server=on,wait=off"),
            *("-device", "virtio-scsi-pci,id=scsi"),
            *("-device", "pcie-root-port,id=plug,chassis=1"),
        ]
        for name, image in disks.items():
            command += ["-drive", self._drive(name, image)]
            command += ["-device", self._device(name)]
        self.opened: list[socket.socket | TextIO] = []
        self.process = subprocess.Popen([str(word) for word in command])
        try:
            self.wire = Wire(self._connect("agent"))
            self.qmp = self._connect("qmp")
            self.qmp.settimeout(300)
            self.lines = self.qmp.makefile("r")
            self.opened.append(self.lines)
            self.lines.readline()
            self.control("qmp_capabilities")
        except BaseException:
            self.close()
            raise

    def _drive(self, name: str, image: Path) -> str:
        return f"file={image},format=raw,if=none,id=drive-{name}"

    def _device(self, name: str, bus: str = "") -> str:
        if self.bus == "scsi":
            return f"scsi-hd,drive=drive-{name},serial={name},id={name},bus=scsi.0"
        device = f"virtio-blk-pci,drive=drive-{name},serial={name},id={name}"
        return f"{device},bus={bus}" if bus else device

    def _connect(self, name: str) -> socket.socket:
        for _ in deadline_loop(f"QEMU's socket {name}"):
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(str(self.directory / name))
            except OSError:
                connection.close()
                assert self.process.poll() is None
            else:
                self.opened.append(connection)
                return connection
        raise AssertionError

    def reconnect(self) -> None:
        """Close the connection to the agent and open another."""
        self.wire.sock.close()
        self.wire = Wire(self._connect("agent"))

    def control(self, command: str, **arguments: Any) -> Any:
        """Give QEMU an order, and return its answer."""
        request = {"execute": command, "arguments": arguments}
        self.qmp.sendall(json.dumps(request).encode())
        while True:
            answer = json.loads(self.lines.readline())
            if "return" in answer or "error" in answer:
                assert "error" not in answer, answer
                return answer["return"]

    def plug(self, name: str, image: Path) -> None:
        """Attach a disk to the running guest."""
        line = f"drive_add dummy {self._drive(name, image)}"
        self.control("human-monitor-command", **{"command-line": line})
        pairs = dict(p.split("=") for p in self._device(name, "plug").split(",")[1:])
        driver = "scsi-hd" if self.bus == "scsi" else "virtio-blk-pci"
        self.control("device_add", driver=driver, **pairs)

    def enter(self, **settings: str) -> str | None:
        """Begin stage two with all disks; return None or what went wrong."""
        entries = {
            "name": "tiny",
            "time": str(time.time_ns()),
            "seed": os.urandom(64).hex(),
            "root": "xvda",
            "private": "xvdb",
            "volatile": "xvdc",
            "deadline": "200",
        } | settings
        payload = strings(*(f"{key}={value}" for key, value in entries.items()))
        return self.wire.control(ENTER, payload, timeout=300)

    def output(self, command: str, user: str = "root") -> str:
        """Run a command that must succeed; return what it prints."""
        result = self.wire.run(command, user=user, timeout=300)
        assert (result.kind, result.value) == (0, 0), result
        return result.stdout.decode()

    def close(self) -> None:
        """Kill it, whatever state it is in."""
        self.process.kill()
        self.process.wait()
        for opened in self.opened:
            opened.close()


def make_disks(directory: Path, root: Path) -> dict[str, Path]:
    """Return fresh disks: a copy of that root, an ext4 private, an empty volatile."""
    disks = {name: directory / f"{name}.img" for name in ("xvda", "xvdb", "xvdc")}
    shutil.copyfile(root, disks["xvda"])
    subprocess.run(["mke2fs", "-q", "-t", "ext4", disks["xvdb"], "32M"], check=True)
    with disks["xvdb"].open("r+b") as image:
        image.truncate(48 << 20)  # larger than its filesystem
    with disks["xvdc"].open("wb") as image:
        image.truncate(64 << 20)
    return disks
