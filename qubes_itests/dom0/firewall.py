"""What nft does in guests: chains of Qubes OS, firewall rules, hidden addresses."""

from __future__ import annotations

import re
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Final

from qubes_itests.guest.start.network import DOWNLINK

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from ipaddress import IPv6Address

__all__ = ["base_rules", "firewall_rules", "hiding_rules", "named_hosts"]

#: By version of IP what nft calls it, and its protocol for errors.
_FAMILY: Final = {4: "ip", 6: "ip6"}
_ICMP: Final = {4: "icmp", 6: "icmpv6"}
_HOST: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,252}")
#: Of what a rule says, by its word, what may go into a command.
_VALUES: Final = {
    "action": re.compile("accept|drop"),
    "proto": re.compile("tcp|udp|icmp"),
    "dst4": re.compile("[0-9.]+(/[0-9]+)?"),
    "dst6": re.compile("[0-9a-f:.]+(/[0-9]+)?"),
    "dsthost": _HOST,
    "dstports": re.compile("[0-9]+-[0-9]+"),
    "icmptype": re.compile("[0-9]+"),
    "specialtarget": re.compile("dns"),
}
#: What a rule may say that makes no difference while it is there.
_SILENT: Final = ("comment", "expire")


def base_rules(version: int) -> str:
    """Return the chains that users and tests add to, and what is around them.

    :param version: of IP.
    """
    return f"""\
table {_FAMILY[version]} qubes {{
  chain custom-input {{ }}
  chain custom-forward {{ }}
  chain input {{
    type filter hook input priority filter; policy drop;
    jump custom-input
    ct state established,related accept
    meta l4proto {_ICMP[version]} accept
    iifname lo accept
  }}
  chain forward {{
    type filter hook forward priority filter; policy accept;
    jump custom-forward
    ct state established,related accept
    oifname {DOWNLINK} drop
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    oifname != {{ lo, {DOWNLINK} }} masquerade
  }}
}}
"""


def hiding_rules(visible: Mapping[IPv4Address, IPv4Address]) -> str:
    """Return rules that replace the addresses which clients believe to have.

    Before anything else looks at them, and after all else has: routes, connections and
    rules are about the real ones.

    :param visible: by real address the other one.
    """
    coming = ["type filter hook prerouting priority raw;"]
    leaving = ["type filter hook postrouting priority srcnat + 50;"]
    for real, fake in visible.items():
        coming.append(f"iifname {DOWNLINK} ip saddr {fake} ip saddr set {real}")
        leaving.append(f"oifname {DOWNLINK} ip daddr {real} ip daddr set {fake}")
    return _replaced("ip", "qubes-visible", {"coming": coming, "leaving": leaving})


def firewall_rules(
    version: int,
    rules: Mapping[IPv4Address | IPv6Address, Mapping[str, str]],
    dns: Iterable[str],
    hosts: Mapping[str, Sequence[str]],
    visible: Mapping[IPv4Address, IPv4Address],
) -> str:
    """Return what clients may send on, each by its own rules.

    What they send in reply always passes, and what is from none of them never does.

    :param version: of IP.
    :param rules: by address of a client, what the core has written for it into qubesdb:
        ``policy``, and rules by their numbers.
    :param dns: the name servers that clients ask.
    :param hosts: addresses of named hosts.
    :param visible: as for `hiding_rules`.
    :raise ValueError: a rule is none of Qubes OS.
    """
    family, icmp = _FAMILY[version], _ICMP[version]
    chains = {}
    forward = [
        "type filter hook forward priority filter - 1;",
        f"iifname != {DOWNLINK} accept",
        "ct direction reply accept",
    ]
    for number, (address, entries) in enumerate(rules.items()):
        reject = f"reject with {icmp} type admin-prohibited"
        if isinstance(address, IPv4Address) and address in visible:
            # An error has in it what it is about. With an address that the client does
            # not know it is none of its own, and a connection hangs for two minutes.
            reject = f"ip saddr set {visible[address]} {reject}"
        chains[f"vm{number}"] = [
            *(
                f"{match}{'accept' if action == 'accept' else reject}"
                for name in sorted(entries.keys() - {"policy"})
                for action, match in _matches(entries[name], version, dns, hosts)
            ),
            "accept" if entries.get("policy") == "accept" else reject,
        ]
        forward.append(f"{family} saddr {address} jump vm{number}")
    chains["forward"] = [*forward, "drop"]
    return _replaced(family, "qubes-firewall", chains)


def named_hosts(entries: Mapping[str, str]) -> set[str]:
    """Return the names of hosts in the rules of a client; ValueError as above."""
    parsed = [_words(text) for name, text in entries.items() if name != "policy"]
    return {words["dsthost"] for words in parsed if "dsthost" in words}


def _replaced(family: str, table: str, chains: Mapping[str, Sequence[str]]) -> str:
    """Return what sets a whole table anew, at once; chains that others name first."""
    name = f"table {family} {table}"
    content = "".join(
        f"  chain {chain} {{\n{''.join(f'    {line}{chr(10)}' for line in lines)}  }}\n"
        for chain, lines in chains.items()
    )
    return f"{name}\ndelete {name}\n{name} {{\n{content}}}\n"


def _words(rule: str) -> dict[str, str]:
    # a comment is the last of it, and may have spaces
    pairs = (word.partition("=") for word in rule.partition(" comment=")[0].split())
    words = {key: value for key, _, value in pairs if key not in _SILENT}
    for key, value in words.items():
        if key not in _VALUES or not _VALUES[key].fullmatch(value):
            raise ValueError(f"expected a firewall rule, got {key}={value} in {rule!r}")
    return words


def _matches(
    rule: str, version: int, dns: Iterable[str], hosts: Mapping[str, Sequence[str]]
) -> list[tuple[str, str]]:
    """Return a rule's action with each set of packets that it is about."""
    words = _words(rule)
    family, proto = _FAMILY[version], words.get("proto")
    match = []
    if proto is not None:
        match.append(f"meta l4proto {_ICMP[version] if proto == 'icmp' else proto}")
    if (network := words.get(f"dst{version}")) is not None:
        match.append(f"{family} daddr {network}")
    if (host := words.get("dsthost")) is not None:
        match.append(f"{family} daddr {{ {', '.join(hosts[host])} }}")
    if (number := words.get("icmptype")) is not None:
        match.append(f"{_ICMP[version]} type {number}")
    ports = words.get("dstports")
    unknown = host is not None and not hosts[host]
    if words.get("specialtarget") == "dns":
        # they have no server of IPv6; and each is asked by the address that clients
        # know, in place of which the packet may have another by now
        unknown = unknown or version != 4 or ports not in (None, "53-53")  # noqa: PLR2004
        ports = "53-53"
        match.append(f"ct original {family} daddr {{ {', '.join(dns)} }}")
    protos = [proto] if proto else ["tcp", "udp"]
    parts = [[f"{each} dport {ports}"] for each in protos] if ports else [[]]
    action = words.get("action", "drop")
    if unknown:
        return []
    return [(action, "".join(f"{x} " for x in (*match, *part))) for part in parts]
