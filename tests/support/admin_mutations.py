"""Requests of the Admin API with seeded mutations, and a judge of the answers."""

import random
import re
import socket

from admin_client import frame

_DEVICE = "dom0+sda:0000:0000::?******"

#: Requests that are right, of every method, about the VMs of the fixture `app`.
VALID = [
    frame("admin.vm.List"),
    frame("admin.vmclass.List"),
    frame("admin.vm.property.List", "work"),
    frame("admin.vm.property.Get", "work", "memory"),
    frame("admin.vm.property.GetAll", "work"),
    frame("admin.vm.property.GetDefault", "work", "netvm"),
    frame("admin.vm.property.Set", "work", "memory", b"500"),
    frame("admin.vm.property.Set", "work", "label", b"green"),
    frame("admin.vm.property.Set", "work", "netvm", b""),
    frame("admin.vm.property.Set", "work", "debug", b"True"),
    frame("admin.vm.property.Set", "work", "template", b"tiny"),
    frame("admin.vm.property.Reset", "work", "memory"),
    frame("admin.vm.property.Help", "work", "memory"),
    frame("admin.property.Get", "dom0", "default_netvm"),
    frame("admin.property.Set", "dom0", "default_template", b"tiny"),
    frame("admin.vm.feature.Set", "work", "os", b"Linux"),
    frame("admin.vm.feature.CheckWithTemplate", "work", "os"),
    frame("admin.vm.feature.Remove", "work", "os"),
    frame("admin.vm.tag.Set", "work", "mine"),
    frame("admin.vm.tag.Remove", "work", "mine"),
    frame("admin.label.Get", "dom0", "red"),
    frame("admin.vm.Create.AppVM", "dom0", "tiny", b"name=new label=red"),
    frame(
        "admin.vm.CreateInPool.AppVM",
        "dom0",
        "tiny",
        b"name=new label=red pool=default",
    ),
    frame("admin.vm.CreateDisposable", "work", "", b"uuid"),
    frame("admin.vm.Remove", "new"),
    frame("admin.vm.Start", "work"),
    frame("admin.vm.Shutdown", "work", "force+wait"),
    frame("admin.vm.Kill", "work"),
    frame("admin.vm.Pause", "work"),
    frame("admin.vm.CurrentState", "work"),
    frame("admin.vm.volume.List", "work"),
    frame("admin.vm.volume.Info", "work", "private"),
    frame("admin.vm.volume.ListSnapshots", "work", "private"),
    frame("admin.vm.volume.Revert", "work", "private", b"1@2026-01-01T00:00:00Z"),
    frame("admin.vm.volume.Resize", "work", "private", b"8388608"),
    frame("admin.vm.volume.CloneFrom", "work", "private"),
    frame("admin.vm.volume.CloneTo", "work", "private", b"x" * 32),
    frame("admin.vm.volume.ImportWithSize", "work", "private", b"4\ndata"),
    frame("admin.vm.volume.Set.rw", "work", "private", b"False"),
    frame("admin.vm.volume.Set.revisions_to_keep", "work", "private", b"3"),
    frame("admin.pool.Info", "dom0", "default"),
    frame("admin.pool.Set.revisions_to_keep", "dom0", "default", b"2"),
    frame("admin.pool.Remove", "dom0", "default"),
    # without a directory: a mutated one would be made somewhere
    frame("admin.pool.Add", "dom0", "file", b"name=second\nrevisions_to_keep=1\n"),
    frame(
        "admin.vm.firewall.Set", "work", "", b"action=accept proto=tcp dstports=80\n"
    ),
    frame("admin.vm.notes.Set", "work", "", "a note é".encode()),
    frame("admin.Events", "work"),
    frame("admin.vm.Stats", "work"),
    frame("admin.backup.Info", "dom0", "weekly"),
    frame("admin.deviceclass.List"),
    frame("admin.vm.Remove", "dvm"),
    frame("admin.label.List"),
    frame("admin.label.Index", "dom0", "red"),
    frame("admin.label.Create", "dom0", "pink", b"0xff00ff"),
    frame("admin.label.Remove", "dom0", "pink"),
    frame("admin.pool.List"),
    frame("admin.pool.ListDrivers"),
    frame("admin.pool.UsageDetails", "dom0", "default"),
    frame("admin.pool.Set.ephemeral_volatile", "dom0", "default", b"True"),
    frame("admin.pool.volume.List", "dom0", "default"),
    frame("admin.pool.volume.ListOrphans", "dom0", "default"),
    frame("admin.pool.volume.RemoveOrphan", "dom0", "default", b"appvms/x/private"),
    frame("admin.vm.Adopt.AppVM", "dom0", "tiny", b"name=new label=red"),
    frame("admin.vm.Adopt.StandaloneVM", "dom0", "", b"name=new label=red"),
    frame("admin.vm.Adopt.TemplateVM", "dom0", "", b"name=new label=red pool=default"),
    frame("admin.property.List"),
    frame("admin.property.GetAll"),
    frame("admin.property.GetDefault", "dom0", "default_netvm"),
    frame("admin.property.Help", "dom0", "default_netvm"),
    frame("admin.property.HelpRst", "dom0", "default_netvm"),
    frame("admin.property.Reset", "dom0", "default_template"),
    frame("admin.vm.property.HelpRst", "work", "memory"),
    *(frame(f"admin.vm.{act}", "work") for act in ("Unpause", "Suspend", "Resume")),
    frame("admin.vm.Console", "work"),
    frame("admin.vm.Create.StandaloneVM", "dom0", "", b"name=new label=red"),
    frame("admin.vm.Create.TemplateVM", "dom0", "", b"name=new label=red"),
    frame("admin.vm.Create.RemoteVM", "dom0", "", b"name=new label=red"),
    frame("admin.vm.Create.DispVM", "dom0", "dvm", b"name=new label=red"),
    *(
        frame(f"admin.vm.CreateInPool.{name}", "dom0", template, b"name=new label=red")
        for name, template in (
            ("StandaloneVM", ""),
            ("TemplateVM", ""),
            ("RemoteVM", ""),
            ("DispVM", "dvm"),
        )
    ),
    frame("admin.vm.feature.List", "work"),
    frame("admin.vm.feature.Get", "work", "os"),
    *(
        frame(f"admin.vm.feature.CheckWith{whom}", "work", "os")
        for whom in ("Netvm", "AdminVM", "TemplateAndAdminVM")
    ),
    frame("admin.vm.tag.List", "work"),
    frame("admin.vm.tag.Get", "work", "mine"),
    frame("admin.vm.volume.Clear", "work", "private"),
    frame("admin.vm.volume.Import", "work", "private", b"data"),
    frame("admin.vm.volume.Set.ephemeral", "work", "private", b"False"),
    frame("admin.vm.firewall.Get", "work"),
    frame("admin.vm.firewall.Reload", "work"),
    frame("admin.vm.notes.Get", "work"),
    frame("admin.backup.Execute", "dom0", "weekly"),
    frame("admin.backup.Cancel", "dom0", "weekly"),
    *(
        frame(f"admin.vm.device.{name}.{what}", "work", argument, payload)
        for name in ("block", "pci")
        for what, argument, payload in (
            ("Available", "", b""),
            ("Assigned", "", b""),
            ("Attached", "", b""),
            ("Assign", _DEVICE, b"mode='required'"),
            ("Unassign", _DEVICE, b""),
            ("Attach", _DEVICE, b""),
            ("Detach", _DEVICE, b""),
            ("Set.assignment", _DEVICE, b"required"),
        )
    ),
]

_SPICE = [
    b"\0",
    b" ",
    b"+",
    b"%s%n",
    b"\xff\xfe",
    b"\n",
    b"../",
    b"=",
    b"-1",
    b"99999999999999999999",
    b"dom0",
    b"keyword adminvm",
    b"uuid:",
    b"@default",
    b"$(reboot)",
    b"A" * 300,
    b"A" * 5000,
]


def _flip(data, chance):
    at = chance.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :]


def _cut(data, chance):
    at = chance.randrange(len(data))
    return data[:at] + data[at + chance.randrange(1, 9) :]


def _insert(data, chance):
    at = chance.randrange(len(data) + 1)
    return data[:at] + chance.choice(_SPICE) + data[at:]


def _truncate(data, chance):
    return data[: chance.randrange(len(data))]


def _repeat(data, chance):
    at = chance.randrange(len(data))
    return data[:at] + data[at : at + chance.randrange(1, 20)] * 2 + data[at:]


def _cross(data, chance):
    """Take the payload of another request."""
    other = chance.choice(VALID)
    return data.partition(b"\0")[0] + b"\0" + other.partition(b"\0")[2]


def _rewire(data, chance):
    """Take one word of another request's header."""
    words = data.partition(b"\0")[0].split(b" ")
    others = chance.choice(VALID).partition(b"\0")[0].split(b" ")
    at = chance.randrange(min(len(words), len(others)))
    words[at] = others[at]
    return b" ".join(words) + b"\0" + data.partition(b"\0")[2]


def _argument(data, chance):
    """Replace what follows the plus, or the destination."""
    words = data.partition(b"\0")[0].split(b" ")
    at = chance.choice((0, 0, -1))
    spice = chance.choice(_SPICE).replace(b"\0", b"").replace(b" ", b"")
    words[at] = words[0].partition(b"+")[0] + b"+" + spice if at == 0 else spice
    return b" ".join(words) + b"\0" + data.partition(b"\0")[2]


def _payload(data, chance):
    """Do one of the others to the payload alone."""
    header, nul, payload = data.partition(b"\0")
    change = chance.choice((_flip, _cut, _insert, _truncate, _repeat))
    return header + nul + change(payload or b"x", chance)


_MUTATIONS = [
    _flip,
    _cut,
    _insert,
    _truncate,
    _repeat,
    _cross,
    _rewire,
    *[_argument, _payload] * 4,
]


def mutated(count, seed):
    """Yield requests, most of them wrong, some right."""
    chance = random.Random(seed)  # noqa: S311 - repeatable, not secret
    for _ in range(count):
        data = chance.choice(VALID)
        for _ in range(chance.choice((0, 1, 1, 1, 2, 3))):
            if b"\0" in data:
                data = chance.choice(_MUTATIONS)(data, chance)
        yield data


def is_framed(data):
    """Tell whether this is a request, however nonsensical: said anew, not shared."""
    header, nul, _payload = data.partition(b"\0")
    words = header.split(b" ")
    if not nul or len(words) != 4 or len(data) > 65536:
        return False
    called, _source, kind, destination = words
    method, _, _argument = called.partition(b"+")
    if kind != b"name" and (kind, destination) != (b"keyword", b"adminvm"):
        return False
    printable = all(0x21 <= byte <= 0x7E for byte in header.replace(b" ", b""))
    named = re.fullmatch(rb"[A-Za-z0-9_.-]+", method) is not None
    return printable and named and all(words)


def exchange(path, data):
    """Send a request; return the answer, of a stream the beginning."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(300)
        connection.connect(str(path))
        answer = b""
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(65536):
                answer += part
                if answer.startswith(b"1\0"):
                    break
        except (ConnectionResetError, BrokenPipeError):
            pass
        return answer


_EXCEPTION = re.compile(rb"2\0(\w+)\0\0([^\0]+)\0", re.DOTALL)


def complaint(data, answer):
    """Return what is wrong with an answer; empty if it is as the protocol says."""
    if not is_framed(data):
        return "it is no request, and was answered" if answer else ""
    if not answer:
        return "it is a request, and was not answered"
    if answer.startswith((b"0\0", b"1\0")):
        return ""
    match = _EXCEPTION.fullmatch(answer)
    return _about_exception(match[2]) if match else "its answer is none"


def _about_exception(message):
    if b"the server's log" in message:
        return "it failed unexpectedly"
    try:
        message.decode() % ()
    except (ValueError, TypeError, UnicodeDecodeError) as error:
        return f"a client cannot format the message: {error}"
    return ""


def state_of(app):
    """Return all that an invalid request must not change."""
    state = {
        str(vm): (
            dict(vm._values),
            dict(vm.features),
            set(vm.tags),
            vm.notes,
            vm.firewall.rules,
            {
                name: (
                    str(volume.pool),
                    volume.rw,
                    volume.revisions_to_keep,
                    volume.size,
                )
                for name, volume in getattr(vm, "volumes", {}).items()
            },
        )
        for vm in app.domains
    }
    pools = {name: dict(pool.config) for name, pool in app.pools.items()}
    return state, dict(app._values), pools
