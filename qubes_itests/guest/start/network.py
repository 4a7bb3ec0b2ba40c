"""Network set-up in a guest: what the host has the agent's program do there, as root.

One process each, that asks the guest's kernel itself: under emulation that takes a
tenth of what `ip` for each address and route does. Nothing in the command comes from a
guest.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Final

from qubes_itests.guest.exc import GuestRefusedError
from qubes_itests.guest.link.process import answer_of
from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from ipaddress import IPv4Address

    from qubes_itests.guest.link.agent import GuestAgent

__all__ = [
    "DOWNLINK",
    "UPLINK",
    "change_routes",
    "run_as_root",
    "set_up_downlink",
    "set_up_uplink",
]

#: What the interfaces are called in the guest: to the net VM, and to the clients.
UPLINK: Final = "eth0"
DOWNLINK: Final = "vif"

#: Seconds for one request; hot-plugging is part of it.
_TIMEOUT: Final = 20.0
_TEXT_LIMIT: Final = 500

#: Which is there whatever programs a template has.
_PROGRAM: Final = ("exec", "/usr/lib/qubes/agent")


async def set_up_uplink(
    agent: GuestAgent,
    *,
    mac: str,
    address: IPv4Address,
    gateway: IPv4Address,
    dns: Iterable[IPv4Address],
) -> None:
    """Have a guest use the interface to its net VM, once it has appeared.

    :param mac: the interface's hardware address, in lower case.
    :param address: the guest's own.
    :param gateway: the net VM's.
    :param dns: name servers.
    :raise GuestRefusedError: the guest could not.
    :raise DeadlineError: it did not in time.
    """
    words = ("uplink", UPLINK, mac, str(address), str(gateway), *map(str, dns))
    await _run(agent, "set up its uplink", words)


async def set_up_downlink(agent: GuestAgent, *, mac: str, address: IPv4Address) -> None:
    """Have a net VM's guest forward for its clients; as `set_up_uplink`.

    It forwards between them and its uplink only, not between two of them.
    """
    words = ("downlink", DOWNLINK, mac, str(address))
    await _run(agent, "set up its downlink", words)


async def change_routes(
    agent: GuestAgent,
    added: Mapping[IPv4Address, IPv4Address | None],
    removed: Iterable[IPv4Address],
) -> None:
    """Change a net VM's routes to what is behind its downlink; as `set_up_uplink`.

    :param added: by destination, the client that leads there; None for the client
        itself.
    """
    words = ["routes", DOWNLINK, *(f"-{gone}" for gone in removed)]
    for destination, via in added.items():
        words.append(str(destination) if via is None else f"{destination}/{via}")
    await _run(agent, "change its routes", words)


async def run_as_root(
    agent: GuestAgent,
    what: str,
    command: str,
    *,
    input: bytes = b"",  # noqa: A002 - as `answer_of` has it
) -> bytes:
    """Run a command that the host gives; as `set_up_uplink`.

    :param what: what the guest is to do, in words that follow "to".
    :param command: as for ``sh -c``.
    :param input: what it reads.
    :return: what it has written, as the guest says.
    """
    process = await agent.spawn(command, user="root")
    answer = await answer_of(process, what, timeout=_TIMEOUT, input=input)
    if answer.status:
        text = safe_text(answer.stderr[:_TEXT_LIMIT].strip())
        reason = text or f"exit status {answer.status}"
        raise GuestRefusedError(agent.vm, what, reason)
    return answer.stdout


async def _run(agent: GuestAgent, what: str, words: Sequence[str]) -> None:
    await run_as_root(agent, what, shlex.join((*_PROGRAM, *words)))
