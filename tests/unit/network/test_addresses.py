"""Addresses follow from the numbers of VMs, and no two are the same."""

from ipaddress import IPv4Network
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qubes_itests.core import config
from qubes_itests.core.network.addresses import (
    DOWNLINK_MAC,
    check_mac,
    default_mac,
    ipv4_of,
    ipv6_of,
    upstream,
)

qids = st.integers(1, config.max_qid)
dispids = st.integers(0, 9999)
vms = st.one_of(
    st.builds(lambda qid: SimpleNamespace(qid=qid, disposable_number=None), qids),
    st.builds(lambda q, d: SimpleNamespace(qid=q, disposable_number=d), qids, dispids),
)


@pytest.mark.parametrize(
    ("vm", "ip", "ip6"),
    [
        ({"qid": 5}, "10.137.0.5", "fd09:24ef:4179::a89:5"),
        ({"qid": 300}, "10.137.1.44", "fd09:24ef:4179::a89:12c"),
        (
            {"qid": 5, "disposable_number": 9999},
            "10.138.39.15",
            "fd09:24ef:4179::a8a:270f",
        ),
    ],
)
def test_as_qubes_assigns_them(vm, ip, ip6):
    vm = SimpleNamespace(**{"disposable_number": None, **vm})
    assert str(ipv4_of(vm)) == ip
    assert str(ipv6_of(vm)) == ip6


@given(vm=vms)
def test_addresses_are_in_the_network_of_their_kind(vm):
    kind = "10.138.0.0/16" if vm.disposable_number is not None else "10.137.0.0/16"
    assert ipv4_of(vm) in IPv4Network(kind)


def test_no_two_vms_have_the_same():
    every = [
        SimpleNamespace(qid=qid, disposable_number=None)
        for qid in range(1, config.max_qid + 1)
    ]
    macs = {default_mac(vm) for vm in every}
    assert len(macs) == len({ipv4_of(vm) for vm in every}) == config.max_qid
    assert DOWNLINK_MAC not in macs


@given(vm=st.builds(lambda qid: SimpleNamespace(qid=qid, disposable_number=None), qids))
def test_a_default_mac_may_be_set(vm):
    assert check_mac(vm, None, default_mac(vm).upper()) == default_mac(vm)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "00:16:3e:5e:6c",
        "00:16:3e:5e:6c:01:02",
        "00:16:3e:5e:6c:0g",
        "01:16:3e:5e:6c:01",
        "ff:ff:ff:ff:ff:ff",
        "fe:16:3e:5e:6c:01",
        "00:16:3e:5e:6c:01\n",
        "00-16-3e-5e-6c-01",
        DOWNLINK_MAC,
    ],
)
def test_what_is_no_station_is_refused(value):
    with pytest.raises(ValueError, match=r"\w"):
        check_mac(None, None, value)


def test_upstream_ends_even_in_a_loop():
    class VM:
        netvm = None

    one, two, alone = VM(), VM(), VM()
    one.netvm, two.netvm = two, one
    assert list(upstream(one)) == [two, one]
    assert list(upstream(alone)) == []
