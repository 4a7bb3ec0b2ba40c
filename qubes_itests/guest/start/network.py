"""Network set-up in a guest: commands that the host has it run as root.

They are the same for every guest that has a shell and `ip`; nothing in them comes from
a guest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qubes_itests.guest.exc import GuestRefusedError
from qubes_itests.guest.link.process import answer_of
from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from ipaddress import IPv4Address

    from qubes_itests.guest.link.agent import GuestAgent

__all__ = ["DOWNLINK", "UPLINK", "change_routes", "set_up_downlink", "set_up_uplink"]

#: What the interfaces are called in the guest: to the net VM, and to the clients.
UPLINK: Final = "eth0"
DOWNLINK: Final = "vif"

#: Seconds for one request; hot-plugging is part of it.
_TIMEOUT: Final = 20.0
_TEXT_LIMIT: Final = 500

#: By an interface's hardware address, for a guest may call it what it likes.
_FIND: Final = """
set -e
find_interface() {
    for file in /sys/class/net/*/address; do
        read -r address < "$file" || continue
        device=${file%/address}
        device=${device##*/}
        if [ "$address" = "$MAC" ]; then return 0; fi
    done
    return 1
}
until find_interface 2> /dev/null; do sleep 0.02; done
if [ "$device" != "$NAME" ]; then
    ip link set dev "$device" down
    ip link set dev "$device" name "$NAME"
fi
if [ -d /proc/sys/net/ipv6/conf/$NAME ]; then
    echo 1 > /proc/sys/net/ipv6/conf/$NAME/disable_ipv6
fi
ip address add $ADDRESS/32 dev $NAME
ip link set dev $NAME up
"""

#: Table 137 is for what comes from clients: it leads to the uplink and nowhere else,
#: whatever routes to other clients the main table has.
_TABLE: Final = 137

_UPLINK: Final = f"""{_FIND}
ip route add $GATEWAY dev $NAME scope link
ip route add default via $GATEWAY dev $NAME onlink
ip route replace default via $GATEWAY dev $NAME onlink table {_TABLE}
if [ -w /etc/resolv.conf ] || [ ! -e /etc/resolv.conf ]; then
    for server in $DNS; do echo "nameserver $server"; done > /etc/resolv.conf
fi
"""

_DOWNLINK: Final = f"""{_FIND}
ip route add unreachable default metric 1000 table {_TABLE}
ip rule add iif $NAME lookup {_TABLE} priority 100
cd /proc/sys/net/ipv4
echo 1 > conf/all/rp_filter
echo 1 > conf/$NAME/rp_filter
echo 0 > conf/all/send_redirects
echo 0 > conf/$NAME/send_redirects
echo 1 > ip_forward
"""


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
    settings = {
        "NAME": UPLINK,
        "MAC": mac,
        "ADDRESS": str(address),
        "GATEWAY": str(gateway),
        "DNS": " ".join(map(str, dns)),
    }
    await _run(agent, "set up its uplink", _UPLINK, settings)


async def set_up_downlink(agent: GuestAgent, *, mac: str, address: IPv4Address) -> None:
    """Have a net VM's guest forward for its clients; as `set_up_uplink`.

    It forwards between them and its uplink only, not between two of them.
    """
    settings = {"NAME": DOWNLINK, "MAC": mac, "ADDRESS": str(address)}
    await _run(agent, "set up its downlink", _DOWNLINK, settings)


async def change_routes(
    agent: GuestAgent,
    added: Mapping[IPv4Address, IPv4Address | None],
    removed: Iterable[IPv4Address],
) -> None:
    """Change a net VM's routes to what is behind its downlink; as `set_up_uplink`.

    :param added: by destination, the client that leads there; None for the client
        itself.
    """
    lines = [f"ip route del {gone} dev {DOWNLINK} || true" for gone in removed]
    for destination, via in added.items():
        how = "scope link" if via is None else f"via {via} onlink"
        lines.append(f"ip route replace {destination} dev {DOWNLINK} {how}")
    await _run(agent, "change its routes", "\n".join(("set -e", *lines)), {})


async def _run(
    agent: GuestAgent, what: str, script: str, settings: Mapping[str, str]
) -> None:
    process = await agent.spawn(script, user="root", environment=settings)
    answer = await answer_of(process, what, timeout=_TIMEOUT)
    if answer.status:
        text = safe_text(answer.stderr[:_TEXT_LIMIT].strip())
        reason = text or f"exit status {answer.status}"
        raise GuestRefusedError(agent.vm, what, reason)
