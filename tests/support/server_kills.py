"""``kill -9`` of a server whose clients make, copy, enlarge, fill and remove VMs."""

from __future__ import annotations

import dataclasses
import random
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from admin_client import AdminError, EmptyReplyError
from conditions import wait_until
from served import Served

from qubes_storage.layout import find_volumes

if TYPE_CHECKING:
    from collections.abc import Mapping

CLIENTS = 4
#: The server is killed when so many calls are done at the most, and seconds after that.
MOST_CALLS = 8
LONGEST = 0.5
#: Seconds that these may take.
TIMEOUT = 600
MIB = 1 << 20
#: Bytes of a private volume that was just made.
DEFAULT = 2 << 30
#: How a volume begins that nothing was imported into, and so a filesystem.
FRESH = bytes(8)
GONE = (OSError, EmptyReplyError)


@dataclasses.dataclass
class Known:
    """What a client knows of a VM of its own; each value is one that may be."""

    classes: set[str | None]
    contents: set[bytes] = dataclasses.field(default_factory=lambda: {FRESH})
    sizes: set[int] = dataclasses.field(default_factory=lambda: {DEFAULT})


@dataclasses.dataclass
class Findings:
    """What was found wrong, and how much was looked at."""

    kills: int = 0
    acknowledged: int = 0
    interrupted: int = 0
    lost: list[str] = dataclasses.field(default_factory=list)
    hollow: list[str] = dataclasses.field(default_factory=list)
    orphans: list[str] = dataclasses.field(default_factory=list)

    @property
    def wrong(self) -> list[str]:
        return [*self.lost, *self.hollow, *self.orphans]

    def __str__(self):
        return (
            f"{self.kills} kills, {self.acknowledged} calls acknowledged,"
            f" {self.interrupted} interrupted; lost {len(self.lost)}, VMs without"
            f" volumes {len(self.hollow)}, orphans {len(self.orphans)}"
        )


class Client(threading.Thread):
    """Makes calls about VMs of its own until the server is gone."""

    def __init__(self, served, number, chance, vms: dict[str, Known]):
        super().__init__()
        self.client = served.client
        self.prefix = f"c{number}-"
        self.chance = chance
        self.vms = vms
        self.acknowledged = 0
        self.interrupted = False
        self.refused: list[str] = []

    def run(self):
        while not self.interrupted:
            mine = [n for n in self.vms if n.startswith(self.prefix)]
            if len(mine) < 2:
                self.create()
            elif len(mine) > 5:
                self.remove(mine)
            else:
                ways = (self.clone, self.resize, self.fill, self.remove)
                self.chance.choice(ways)(mine)

    def _call(self, method, destination="dom0", argument="", payload=b""):
        try:
            self.client.call(method, destination, argument, payload)
        except AdminError as error:
            self.refused.append(f"{method} {destination} {payload!r}: {error}")
            self.interrupted = True
        except GONE:
            self.interrupted = True
            return False
        self.acknowledged += 1
        return True

    def _new_name(self):
        taken = {int(name.partition("-")[2]) for name in self.vms if "-" in name}
        return f"{self.prefix}{max(taken, default=0) + 1}"

    def create(self):
        name = self._new_name()
        cls, template = self.chance.choice((("AppVM", "tiny"), ("StandaloneVM", "")))
        self.vms[name] = Known({cls, None})
        payload = f"name={name} label=red".encode()
        if self._call(f"admin.vm.Create.{cls}", "dom0", template, payload):
            self.vms[name].classes = {cls}

    def clone(self, mine):
        """Do as ``qvm-clone`` does: make a VM, and have its volume filled."""
        name = self.chance.choice(mine)
        source = self.vms[name]
        self.create()
        new = list(self.vms)[-1]
        if self.interrupted:
            return
        try:
            token = self.client.call("admin.vm.volume.CloneFrom", name, "private")
        except GONE:
            self.interrupted = True
            return
        known = self.vms[new]
        known.contents |= source.contents
        known.sizes = {DEFAULT} | source.sizes
        if self._call("admin.vm.volume.CloneTo", new, "private", token):
            known.contents = set(source.contents)
            known.sizes = set(source.sizes)

    def resize(self, mine):
        name = self.chance.choice(mine)
        known = self.vms[name]
        size = max(known.sizes) + MIB
        known.sizes = known.sizes | {size}
        if self._call("admin.vm.volume.Resize", name, "private", str(size).encode()):
            known.sizes = {size}

    def fill(self, mine):
        known = self.vms[name := self.chance.choice(mine)]
        data = self.chance.randbytes(8)
        known.contents, known.sizes = known.contents | {data}, known.sizes | {8}
        payload = b"8\n" + data
        if self._call("admin.vm.volume.ImportWithSize", name, "private", payload):
            known.contents, known.sizes = {data}, {8}

    def remove(self, mine):
        name = self.chance.choice(mine)
        known = self.vms[name]
        known.classes |= {None}
        if self._call("admin.vm.Remove", name):
            del self.vms[name]


def _descendants(pid):
    path = Path(f"/proc/{pid}/task/{pid}/children")
    for child in path.read_text().split():
        yield int(child)
        yield from _descendants(int(child))


def pool_of(served):
    """Return the directory of the server's pool, which is mounted in its sandbox."""
    inside = served.state.relative_to("/") / "btrfs" / "varlibqubes"
    for pid in (served.process.pid, *_descendants(served.process.pid)):
        path = Path(f"/proc/{pid}/root") / inside
        if (path / ".lock").exists():
            return path
    raise AssertionError(f"no process of the server has {inside} mounted")


def listed(client):
    """Return the VMs, with their classes."""
    lines = client.call("admin.vm.List").decode().splitlines()
    words = [line.split() for line in lines]
    return {name: cls.removeprefix("class=") for name, cls, *_ in words}


def look(served, vms: dict[str, Known], findings: Findings) -> None:
    """Compare what a server has with what its clients know, and forget the doubts."""
    pool, there = pool_of(served), listed(served.client)
    for name, known in list(vms.items()):
        if (cls := there.get(name)) not in known.classes:
            findings.lost.append(f"{name}: {cls}, not one of {known.classes}")
        if cls is None:
            del vms[name]
            continue
        known.classes = {cls}
        image = pool / "appvms" / name / "private.img"
        if image.exists():
            _look_into(name, image, known, findings)
    keeping = {"AppVM": ("private",), "StandaloneVM": ("root", "private")}
    expected = {
        f"appvms/{name}/{volume}"
        for name, cls in there.items()
        for volume in keeping.get(cls, ())
    }
    found = {v.vid for v in find_volumes(pool) if v.vid.startswith("appvms/")}
    findings.hollow += sorted(expected - found)
    findings.orphans += sorted(found - expected)
    told = served.client.call("admin.pool.volume.ListOrphans", "dom0", "varlibqubes")
    findings.orphans += told.decode().split()
    findings.lost += [f"{name}: not known" for name in there if _unknown(name, vms)]
    notes = served.state / "qubes.xml.journal"
    findings.lost += [f"{note}: left" for note in notes.glob("*")]


def _unknown(name, vms):
    return name not in ("dom0", "tiny") and name not in vms


def _look_into(name, image, known, findings):
    with image.open("rb") as file:
        data = file.read(8)
    if data not in known.contents:
        findings.lost.append(f"{name}: holds {data!r}, not one of {known.contents}")
    known.contents = {data}
    size = image.stat().st_size
    if size not in known.sizes:
        findings.lost.append(f"{name}: {size} bytes, not one of {known.sizes}")
    known.sizes = {size}


def kill_again_and_again(
    environment: Mapping[str, str], directory: Path, *, seed: int, kills: int, say=print
) -> Findings:
    """Kill a server so many times at a random instant, and look at what each leaves.

    :param environment: of the servers.
    :param directory: where they keep their state.
    :param seed: of what the clients do, and when it ends.
    :param say: told after each kill.
    """
    vms: dict[str, Known] = {}
    findings = Findings()
    for number in range(kills + 1):
        chance = random.Random(f"{seed}-{number}")  # noqa: S311 - to be repeated
        with Served(
            environment, "--directory", directory, "--hypervisor=test"
        ) as served:
            look(served, vms, findings)
            if findings.wrong or number == kills:
                break
            _disturb(served, vms, chance, findings)
        say(f"{number}: {findings}")
    return findings


def _disturb(served, vms, chance, findings):
    # each has its own VMs and its own chances; the dict of each is put together again
    shares = [
        {n: known for n, known in vms.items() if n.startswith(f"c{number}-")}
        for number in range(CLIENTS)
    ]
    clients = [
        Client(served, number, random.Random(chance.random()), share)  # noqa: S311
        for number, share in enumerate(shares)
    ]
    for client in clients:
        client.start()
    enough = chance.randint(0, MOST_CALLS)
    wait_until(
        lambda: (
            sum(client.acknowledged for client in clients) >= enough
            or any(client.refused for client in clients)
        ),
        f"{enough} calls",
        TIMEOUT,
    )
    threading.Event().wait(chance.uniform(0, LONGEST))
    served.end(signal.SIGKILL)
    vms.clear()
    for client in clients:
        client.join()
        vms |= client.vms
        findings.acknowledged += client.acknowledged
        findings.interrupted += client.interrupted
        findings.lost += client.refused
    findings.kills += 1
