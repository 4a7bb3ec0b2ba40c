"""Firewall rules are read strictly, and written in one form."""

import time

import pytest

from qubes_itests.core.network.firewall import Firewall, FirewallRuleError, parse_rule


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("action=accept", "action=accept"),
        (
            "proto=tcp action=drop dstports=443",
            "action=drop proto=tcp dstports=443-443",
        ),
        ("action=accept dst4=10.0.0.1", "action=accept dst4=10.0.0.1/32"),
        ("action=accept dsthost=10.0.0.0/8", "action=accept dst4=10.0.0.0/8"),
        ("action=accept dsthost=fd00::1", "action=accept dst6=fd00::1/128"),
        ("action=accept dsthost=example.com", "action=accept dsthost=example.com"),
        (
            "action=accept proto=icmp icmptype=8",
            "action=accept proto=icmp icmptype=8",
        ),
        ("action=accept specialtarget=dns", "action=accept specialtarget=dns"),
        (
            "action=accept expire=1900000000 comment=for a while",
            "action=accept expire=1900000000 comment=for a while",
        ),
    ],
)
def test_a_rule_is_written_in_one_form(text, canonical):
    assert parse_rule(text) == canonical
    assert parse_rule(canonical) == canonical


@pytest.mark.parametrize(
    "text",
    [
        "",
        "proto=tcp",
        "action=reject",
        "action=accept action=drop",
        "action=accept nonsense",
        "action=accept colour=red",
        "action=accept dstports=80",
        "action=accept proto=icmp dstports=80",
        "action=accept proto=tcp dstports=90-80",
        "action=accept proto=tcp dstports=65536",
        "action=accept proto=tcp dstports=-1",
        "action=accept proto=tcp dstports=1-2-3",
        "action=accept icmptype=8",
        "action=accept proto=icmp icmptype=256",
        "action=accept dst4=10.0.0.0/33",
        "action=accept dst4=fd00::1",
        "action=accept dst6=10.0.0.1",
        "action=accept dst4=10.0.0.1 dsthost=example.com",
        "action=accept dsthost=EXAMPLE",
        "action=accept dsthost=$(reboot)",
        "action=accept specialtarget=all",
        "action=accept expire=tomorrow",
        "action=accept comment=a\nb",
        "action=accept comment=`x`",
    ],
)
def test_what_is_no_rule_is_refused(text):
    with pytest.raises(FirewallRuleError):
        parse_rule(text)


def test_one_bad_rule_leaves_all_as_they_were():
    firewall = Firewall()
    firewall.rules = ["action=drop"]
    with pytest.raises(FirewallRuleError):
        firewall.rules = ["action=accept", "action=nonsense"]
    assert firewall.rules == ("action=drop",)


def test_a_rule_that_has_expired_is_gone():
    """When it is set, and later."""
    firewall = Firewall()
    now = int(time.time())
    kept = f"action=accept expire={now + 1000} comment=expire 5"
    firewall.rules = ["action=drop expire=1", kept]
    assert firewall.rules == (kept,)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(time, "time", lambda: float(now + 1000))
        assert firewall.rules == ()
    assert firewall.rules == ()
