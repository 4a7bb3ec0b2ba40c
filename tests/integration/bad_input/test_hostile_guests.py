"""Guests and names that are bad: each is told in its own test, and the run goes on."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from leftovers import wait_for_no_leftovers
from plugin_site import FOR_TEMPLATE

NO_NAME = "has characters that a name cannot have"

#: Of each test that must fail, how the line with its cause begins, and goes on.
CAUSES = {
    "TC_00_Guests_tiny::test_silent": (
        "QubesVMStartError: VM test-inst-bad did not start:",
        "it could not reach its agent: not done within N s; the end of its console: I",
    ),
    "TC_00_Guests_tiny::test_dies": (
        "QubesVMStartError: VM test-inst-bad did not start:",
        "it could not reach its agent: the guest crashed; the end of its console: my",
    ),
    "TC_00_Guests_tiny::test_garbage_at_once": (
        "QubesVMStartError: VM test-inst-bad did not start:",
        "it could not reach its agent: it broke the rule that",
    ),
    "TC_00_Guests_tiny::test_port_taken_away": (
        "GuestGoneError: VM test-inst-mute:",
        "the connection to its agent has ended: the VM or its agent has stopped",
    ),
    "TC_00_Guests_tiny::test_full_pool": (
        "QubesVMStartError: VM test-inst-late did not start: it could not start its",
        "storage: volume private of VM test-inst-late could not be made in pool small",
    ),
    "TC_10_Names_tiny::test_slash": (
        "QubesValueError: VM name 'test-inst-a/b'",
        NO_NAME,
    ),
    "TC_10_Names_tiny::test_dots": ("QubesValueError: VM name '..'", NO_NAME),
    "TC_10_Names_tiny::test_newline": (
        r"QubesValueError: VM name 'test-inst-a\nb'",
        NO_NAME,
    ),
    "TC_10_Names_tiny::test_too_long": (
        f"QubesValueError: VM name '{'a' * 32}'",
        "has 32 characters; 31 are the most",
    ),
}
PASSED = [
    "TC_00_Guests_tiny::test_flood_of_the_console",
    "TC_20_Afterwards_tiny::test_goes_on",
]


@pytest.fixture(scope="module")
def site(make_site, tmp_path_factory):
    site = make_site(tmp_path_factory.mktemp("hostile"))
    site.timeout = 2000
    source = Path(find_spec("hostile_plugin").origin)
    site.install("hostile", source.read_text(), FOR_TEMPLATE)
    return site


@pytest.fixture(scope="module")
def done(site):
    return site.run("hostile", "--tb=no", "--timeout=1000")


@pytest.fixture(scope="module")
def causes(done, site):
    """Return the line with the cause of each failure."""
    assert done.returncode == 21, done.stdout + done.stderr  # a guest has panicked
    found = re.findall(
        r"^hostile::(\S+)\n(?: .*\n)*?  cause +(.*)$",
        site.run("report").stdout,
        re.MULTILINE,
    )
    return dict(found)


@pytest.mark.parametrize("test", CAUSES)
def test_the_last_lines_tell_the_cause(causes, test):
    begin, rest = CAUSES[test]
    # how long a silent guest got is told by the speed of the machine
    cause = re.sub(r"(?<=not done within )\d+(?= s)", "N", causes[test])
    assert cause.startswith(f"{begin} {rest}")


def test_nothing_else_fails(causes, done):
    assert set(causes) == set(CAUSES)
    passed = re.findall(r"^PASSED +hostile::(\S+)", done.stdout, re.MULTILINE)
    assert passed == PASSED


def test_nothing_is_left(done, shared_cache):
    assert done.returncode
    assert wait_for_no_leftovers(shared_cache) == []
    assert "left at the end" not in done.stdout
