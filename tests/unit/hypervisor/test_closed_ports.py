"""The channel of a guest, when libvirt tells that the guest has closed its side."""

import asyncio
import json
import uuid
from pathlib import Path

import pytest
import pytest_asyncio

from qubes_itests.hypervisor import qemu_domain
from qubes_itests.hypervisor.contract import DomainSpec
from qubes_itests.hypervisor.domain_xml import Machine, channel_path

pytestmark = pytest.mark.asyncio


class QEMU:
    """Answers what it is asked in place of libvirt."""

    def __init__(self):
        self.is_open = False

    async def call(self, _domain, _action, _function, _native, text, _flags):
        assert json.loads(text)["execute"] == "query-chardev"
        ports = {"charserial0": True, "charchannel0": self.is_open}
        found = [{"label": n, "frontend-open": v} for n, v in ports.items()]
        return json.dumps({"return": found})


class Channel(asyncio.Protocol):
    def __init__(self):
        self.received, self.heard = b"", asyncio.Event()
        self.lost = asyncio.get_running_loop().create_future()

    def data_received(self, data):
        self.received += data
        self.heard.set()

    def connection_lost(self, exc):
        self.lost.set_result(exc)


@pytest.fixture
def spec(tmp_path):
    return DomainSpec(
        name="work",
        uuid=uuid.uuid4(),
        directory=tmp_path,
        memory=200,
        max_memory=200,
        kernel=Path("/kernel"),
        initramfs=Path("/initramfs"),
    )


@pytest_asyncio.fixture
async def guest(spec):
    """Return a running domain, its channel, and the guest's end of that."""
    ends = asyncio.Queue()
    path = channel_path(spec)
    path.parent.mkdir(exist_ok=True)
    server = await asyncio.start_unix_server(lambda *end: ends.put_nowait(end), path)
    machine = Machine(kvm=False, emulator=Path("/qemu"))
    domain = qemu_domain.QemuDomain(
        QEMU(), spec, print, print, machine=machine, root=spec.directory
    )
    domain._native = object()
    domain._stopped.clear()
    transport, channel = await domain.open_channel(Channel)
    _, writer = await ends.get()
    yield domain, channel, writer
    transport.abort()
    writer.close()
    server.close()


async def test_a_channel_ends_with_its_agent_after_its_last_words(guest):
    domain, channel, writer = guest
    domain.end_channel_with_agent()
    writer.write(b"last words")
    domain.handle_closed_port()
    async with asyncio.timeout(300):
        assert await channel.lost is None
    assert channel.received == b"last words"


async def test_a_channel_goes_on_while_agents_take_over(guest):
    """Before it is to end with the agent; or the next one has opened it already."""
    domain, channel, writer = guest
    domain.handle_closed_port()
    domain.end_channel_with_agent()
    domain._connection.is_open = True
    domain.handle_closed_port()
    await domain._asking
    writer.write(b"here")
    async with asyncio.timeout(300):
        await channel.heard.wait()
    assert not channel.lost.done()


async def test_a_domain_that_has_ended_is_not_asked(guest):
    domain, channel, _ = guest
    domain.end_channel_with_agent()
    domain._stopped.set()
    domain.handle_closed_port()
    await domain._asking
    assert not channel.lost.done()
