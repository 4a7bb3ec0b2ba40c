"""Rules of a core, as nft has them in a net VM."""

import re
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qubes_itests.dom0.firewall import firewall_rules, hiding_rules, named_hosts

CLIENT = IPv4Address("10.137.0.5")
CLIENT6 = IPv6Address("fd09:24ef:4179::a89:5")
DNS = ("10.139.1.1", "10.139.1.2")
ASKED = "{ 10.139.1.1, 10.139.1.2 }"
REJECT = "reject with icmp type admin-prohibited"


def rules_of(*rules, version=4, policy="drop", hosts=None):
    """Return the rules for one client."""
    entries = {f"{number:04}": rule for number, rule in enumerate(rules)}
    client = CLIENT if version == 4 else CLIENT6
    text = firewall_rules(
        version, {client: entries | {"policy": policy}}, DNS, hosts or {}, {}
    )
    lines = re.search(r"chain vm0 \{\n(.*?)\n  \}", text, re.DOTALL)[1].splitlines()
    return [line.strip() for line in lines]


@pytest.mark.parametrize(
    ("rule", "lines"),
    [
        ("action=accept", ["accept"]),
        ("action=drop", [REJECT]),
        ("action=accept proto=icmp", ["meta l4proto icmp accept"]),
        (
            "action=accept proto=icmp icmptype=8",
            ["meta l4proto icmp icmp type 8 accept"],
        ),
        (
            "action=drop proto=tcp dst4=10.0.0.0/8 dstports=80-90",
            [f"meta l4proto tcp ip daddr 10.0.0.0/8 tcp dport 80-90 {REJECT}"],
        ),
        (
            "action=accept dstports=80-80",
            ["tcp dport 80-80 accept", "udp dport 80-80 accept"],
        ),
        (
            "action=accept proto=udp specialtarget=dns",
            [f"meta l4proto udp ct original ip daddr {ASKED} udp dport 53-53 accept"],
        ),
        ("action=accept specialtarget=dns dstports=80-80", []),
        ("action=accept dsthost=two", ["ip daddr { 192.0.2.1, 192.0.2.2 } accept"]),
        ("action=accept dsthost=none", []),
        ("action=accept expire=12 comment=of tcp dst4=x ; {", ["accept"]),
    ],
)
def test_a_rule(rule, lines):
    hosts = {"two": ["192.0.2.1", "192.0.2.2"], "none": []}
    assert rules_of(rule, hosts=hosts) == [*lines, REJECT]


def test_rules_of_ipv6():
    rules = (
        "action=accept proto=icmp icmptype=128",
        "action=drop dst6=2000:abcd::1/128",
        "action=accept specialtarget=dns",
    )
    assert rules_of(*rules, version=6, policy="accept") == [
        "meta l4proto icmpv6 icmpv6 type 128 accept",
        "ip6 daddr 2000:abcd::1/128 reject with icmpv6 type admin-prohibited",
        "accept",
    ]


def test_each_client_has_rules_of_its_own_and_strangers_pass_nothing():
    other = IPv4Address("10.137.0.6")
    text = firewall_rules(4, {CLIENT: {"policy": "accept"}, other: {}}, DNS, {}, {})
    lines = [line.strip() for line in text.splitlines()]
    start = lines.index("chain forward {")
    assert lines[start + 2 : -2] == [
        "iifname != vif accept",
        # what was asked from outside is answered, whatever the rules
        "ct direction reply accept",
        f"ip saddr {CLIENT} jump vm0",
        f"ip saddr {other} jump vm1",
        "drop",
    ]
    assert lines[3:9] == ["chain vm0 {", "accept", "}", "chain vm1 {", REJECT, "}"]


def test_hidden_addresses_are_replaced_both_ways():
    text = hiding_rules({CLIENT: IPv4Address("192.168.1.128")})
    assert "iifname vif ip saddr 192.168.1.128 ip saddr set 10.137.0.5\n" in text
    assert "oifname vif ip daddr 10.137.0.5 ip daddr set 192.168.1.128\n" in text


def test_a_client_is_refused_by_the_address_that_it_knows():
    """An error about another address is none of its own for it: it waits on."""
    other, seen = IPv4Address("10.137.0.6"), IPv4Address("192.168.1.128")
    rules = {CLIENT: {"0": "action=drop proto=tcp", "policy": "drop"}, other: {}}
    lines = firewall_rules(4, rules, DNS, {}, {CLIENT: seen}).splitlines()
    assert [line.strip() for line in lines if "reject" in line] == [
        f"meta l4proto tcp ip saddr set {seen} {REJECT}",
        f"ip saddr set {seen} {REJECT}",
        REJECT,
    ]


def test_hosts_that_rules_name():
    rules = {
        "policy": "drop",
        "0": "action=accept dsthost=a.example",
        "1": "action=drop",
    }
    assert named_hosts(rules) == {"a.example"}


words = st.sampled_from(
    ["action", "proto", "dst4", "dsthost", "dstports", "icmptype", "specialtarget", "x"]
)
values = st.sampled_from(["accept", "tcp", "80-90", "8", "dns"]) | st.text(max_size=9)


@given(st.lists(st.tuples(words, values)))
def test_no_rule_gets_out_of_its_line(pairs):
    rule = " ".join(f"{word}={value}" for word, value in pairs)
    try:
        hosts = {name: ["192.0.2.1"] for name in named_hosts({"0": rule})}
        lines = rules_of(rule, hosts=hosts)
    except ValueError as error:
        assert "expected a firewall rule" in str(error)  # noqa: PT017 - or none
    else:
        assert all(re.fullmatch(r"[a-z0-9 .,:/{}-]+", line) for line in lines)
