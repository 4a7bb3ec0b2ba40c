"""Block devices that other VMs may have: what the guest says of them, and serves."""

from __future__ import annotations

import socket
import struct
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from agent_wire import DB_CHANGED, EXIT, Wire

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from agent_process import AgentProcess


def told(wire: Wire) -> dict[str, str | None]:
    """Return what is said of block devices by the end of a command, by path."""
    stream, changes = wire.spawn("true"), {}
    while (got := wire.receive()) is not None and (got.type, got.stream) != (
        EXIT,
        stream,
    ):
        if got.type == DB_CHANGED:
            path, *value = got.payload.decode().split("\0")[:-1]
            changes[path.removeprefix("/qubes-block-devices")] = next(iter(value), None)
    return changes


class Kernel:
    """The devices of a kernel, as files of sysfs."""

    def __init__(self, agent: AgentProcess) -> None:
        self._agent = agent
        (agent.root / "sys/class/block").mkdir(parents=True)
        self.table("mounts")
        self.table("swaps")

    def device(self, name: str, parent: str = "", **attributes: str | None) -> None:
        """Have a device; __ stands for / in names of attributes, None for no such."""
        place = f"sys/devices/{f'{parent}/' if parent else ''}{name}"
        values = {"size": "8", "ro": "0", "dev": "1:99", "device__vendor": "Maker"}
        for key, value in (values | attributes).items():
            if value is not None:
                self._agent.file(f"{place}/{key.replace('__', '/')}", f"{value}\n")
        link = self._agent.root / "sys/class/block" / name
        if not link.is_symlink():
            link.symlink_to(f"../../devices/{place.removeprefix('sys/devices/')}")

    def remove(self, name: str) -> None:
        (self._agent.root / "sys/class/block" / name).unlink()

    def table(self, name: str, *devices: str) -> None:
        """Have devices in a table: ``mounts`` or ``swaps``."""
        self._agent.file(f"proc/{name}", "".join(f"{d} /x ext4 rw\n" for d in devices))


@pytest.fixture
def kernel(agent: AgentProcess) -> Kernel:
    return Kernel(agent)


def entries(name: str, **values: str) -> dict[str, str | None]:
    full = {"desc": " ()", "size": "4096", "mode": "w", "parent": "", **values}
    return {f"/{name}/{key}": value for key, value in full.items()}


def test_devices_are_told_of_once_before_a_command_ends(
    kernel: Kernel, wire: Wire, agent: AgentProcess
) -> None:
    assert told(wire) == {}
    kernel.device("loop0", loop__backing_file="/home/ü.img", size="262144")
    kernel.device("dm-0", dm__name="test-dm", ro="1")
    kernel.device("sdb", device__model="Stick")
    kernel.device("sdb1", "sdb", partition="1")
    assert told(wire) == {
        **entries("loop0", desc="/home/__.img", size=str(128 << 20)),
        **entries("dm-0", desc="test-dm", mode="r"),
        **entries("sdb", desc="Stick ()"),
        **entries("sdb1", desc="Stick ()", parent="sdb"),
        "": "",
    }
    assert told(wire) == {}
    with agent.client("qubesdb-read", "/qubes-block-devices/dm-0/desc") as client:
        assert client.communicate(timeout=300)[0] == b"test-dm\n"
    kernel.remove("loop0")
    kernel.device("dm-0", dm__name="other")
    gone = dict.fromkeys(entries("loop0"))
    assert told(wire) == {**gone, **entries("dm-0", desc="other"), "": ""}


def test_devices_that_nobody_else_may_have(kernel: Kernel, wire: Wire) -> None:
    kernel.device("loop0")  # without a file
    kernel.device("dm-0", dm__name="snapshot-x")
    kernel.device("dm-1", dm__name="empty", size="0")
    kernel.device("zram0")
    kernel.device("sda", device__model="QEMU")
    # by which the host says what the disk is called: page 0x80, with a header
    kernel._agent.file("sys/block/sda/device/vpd_pg80", "\1\2\3\4xvdb")
    kernel.device("sda1", "sda", partition="1")
    # just plugged in: it has no such page yet
    kernel.device("sdc", device__vendor="QEMU    ")
    # just plugged out: it has nothing of it any more
    kernel.device("sdd", device__vendor=None)
    assert told(wire) == {}


@pytest.mark.parametrize("table", ["mounts", "swaps"])
def test_what_is_used_is_nobody_elses_until_it_is_free(
    kernel: Kernel, wire: Wire, table: str
) -> None:
    """As are those that a part of is used. /dev/null lends its number."""
    kernel.device("sdb", dev="8:16")
    kernel.device("sdb1", "sdb", partition="1", dev="1:3")
    kernel.device("loop0", loop__backing_file="/f", holders__dm="")
    kernel.table(table, "none", "/dev/none", "/dev/null")
    assert told(wire) == {}
    kernel.table(table)
    whole, part = entries("sdb"), entries("sdb1", parent="sdb")
    assert told(wire) == {**whole, **part, "": ""}
    kernel.table(table, "/dev/null")
    assert told(wire) == {**dict.fromkeys(whole), **dict.fromkeys(part), "": ""}


def test_a_host_that_comes_later_is_told_of_all(kernel: Kernel, wire: Wire) -> None:
    kernel.device("sdb")
    assert told(wire) == {**entries("sdb"), "": ""}
    wire.hello()
    assert {wire.expect(DB_CHANGED).payload for _ in range(5)} == {
        f"/qubes-block-devices{path}\0{value}\0".encode()
        for path, value in {**entries("sdb"), "": ""}.items()
    }


def test_no_more_is_told_than_there_is_room_for(kernel: Kernel, wire: Wire) -> None:
    for number in range(100):
        kernel.device(f"loop{number}", loop__backing_file="/" + "f" * 1000)
    assert len(told(wire)) == 32 * 4 + 1


HELLO = struct.Struct(">8s8sH")
OPTION = struct.Struct(">8sII")
ANSWER = struct.Struct(">QIII")
REQUEST = struct.Struct(">IHHQQI")
REPLY = struct.Struct(">IIQ")
READ, WRITE, DISCONNECT, FLUSH, TRIM = range(5)


class Client:
    """A client of NBD."""

    def __init__(self, ours: socket.socket) -> None:
        self._socket = ours
        hello = HELLO.unpack(self.take(HELLO.size))
        assert hello == (b"NBDMAGIC", b"IHAVEOPT", 3)

    def take(self, length: int) -> bytes:
        data = b""
        while len(data) < length and (got := self._socket.recv(length - len(data))):
            data += got
        return data

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def option(self, number: int, data: bytes = b"") -> None:
        self.send(OPTION.pack(b"IHAVEOPT", number, len(data)) + data)

    def export(self) -> tuple[int, int]:
        """Begin; return the size and the flags."""
        self.send(struct.pack(">I", 3))
        self.option(8)  # structured replies, which it has not
        assert ANSWER.unpack(self.take(20)) == (0x3E889045565A9, 8, 0x80000001, 0)
        self.option(1, b"name")
        size, flags = struct.unpack(">QH", self.take(10))
        return size, flags

    def request(
        self, kind: int, offset: int = 0, length: int = 0, data: bytes = b""
    ) -> tuple[int, bytes]:
        """Return the error, and what was read."""
        request = REQUEST.pack(0x25609513, 0, kind, 7, offset, length or len(data))
        self.send(request + data)
        magic, error, handle = REPLY.unpack(self.take(REPLY.size))
        assert (magic, handle) == (0x67446698, 7)
        return error, self.take(length) if kind == READ and not error else b""


@contextmanager
def served(agent: AgentProcess, path: Path, mode: str, status: int) -> Iterator[Client]:
    ours, theirs = socket.socketpair()
    with theirs:
        command = [agent.program, "serve-block", mode, path]
        ours.settimeout(300)
        with subprocess.Popen(command, stdin=theirs, stdout=theirs) as process, ours:
            theirs.close()
            yield Client(ours)
            ours.close()
            assert process.wait(300) == status


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(range(256)) * 64)
    return path


def test_a_device_is_read_and_written(agent: AgentProcess, image: Path) -> None:
    with served(agent, image, "w", 0) as client:
        assert client.export() == (16384, 1 | 4)
        assert client.request(READ, 255, 3) == (0, b"\xff\0\1")
        assert client.request(WRITE, 8192, data=b"said" * 1000) == (0, b"")
        assert client.request(FLUSH) == (0, b"")
        assert client.request(READ, 8192, 8) == (0, b"saidsaid")
        client.send(REQUEST.pack(0x25609513, 0, DISCONNECT, 7, 0, 0))
        assert client.take(1) == b""
    assert image.read_bytes()[8192:12192] == b"said" * 1000


def test_what_cannot_be_done_is_an_error_and_no_end(
    agent: AgentProcess, image: Path
) -> None:
    with served(agent, image, "r", 1) as client:
        assert client.export() == (16384, 1 | 2 | 4)
        assert client.request(WRITE, 0, data=b"x")[0] == 1
        assert client.request(TRIM, 0, 4096)[0] == 22
        assert client.request(READ, 16384, 1)[0] == 22
        assert client.request(READ, 1 << 63, 1)[0] == 22
        assert client.request(READ, 0, 1) == (0, b"\0")
    assert image.read_bytes()[:1] == b"\0"


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        struct.pack(">I", 3) + OPTION.pack(b"IHAVENOT", 1, 0),
        struct.pack(">I", 3) + OPTION.pack(b"IHAVEOPT", 2, 0),
        struct.pack(">I", 3) + OPTION.pack(b"IHAVEOPT", 8, 1 << 31),
    ],
    ids=["nothing", "other magic", "abort", "too long"],
)
def test_a_client_that_does_not_begin(
    agent: AgentProcess, image: Path, sent: bytes
) -> None:
    with served(agent, image, "w", 1) as client:
        client.send(sent)


@pytest.mark.parametrize(
    "sent",
    [
        REQUEST.pack(0x25609514, 0, READ, 7, 0, 1),
        REQUEST.pack(0x25609513, 0, READ, 7, 0, 1 << 31),
        REQUEST.pack(0x25609513, 0, WRITE, 7, 0, 10) + b"cut",
    ],
    ids=["other magic", "too long", "cut"],
)
def test_a_client_that_breaks_the_protocol(
    agent: AgentProcess, image: Path, sent: bytes
) -> None:
    with served(agent, image, "w", 1) as client:
        client.export()
        client.send(sent)
    assert image.read_bytes() == bytes(range(256)) * 64
