"""How this machine's own package sources become those of a template."""

import pytest

from qubes_itests.host import apt
from qubes_itests.host.exc import CommandError

TARGETS = """\
http://mirror.example/debian bookworm main
http://mirror.example/debian bookworm contrib
http://mirror.example/debian bookworm-updates main
http://mirror.example/debian-security/ bookworm-security main
http://other.example/tools stable main
http://other.example/debian trixie main
"""


@pytest.fixture
def answers(monkeypatch):
    """Have the programs of apt answer with these texts."""
    texts = {"apt-get": TARGETS, "apt-config": ""}

    def run(argv):
        if isinstance(texts[argv[0]], Exception):
            raise texts[argv[0]]
        return texts[argv[0]]

    monkeypatch.setattr(apt, "run", run)
    monkeypatch.setattr(
        "platform.freedesktop_os_release",
        lambda: {"ID": "debian", "VERSION_CODENAME": "bookworm"},
    )
    return texts


@pytest.mark.usefixtures("answers")
def test_the_mirrors_of_this_machine_serve_other_releases():
    assert apt.debian_sources("trixie") == [
        "deb http://mirror.example/debian trixie main",
        "deb http://mirror.example/debian trixie-updates main",
        "deb http://mirror.example/debian-security/ trixie-security main",
    ]


@pytest.mark.usefixtures("answers")
def test_another_distribution_has_no_sources_of_debian(monkeypatch):
    monkeypatch.setattr(
        "platform.freedesktop_os_release",
        lambda: {"ID": "ubuntu", "VERSION_CODENAME": "noble"},
    )
    assert apt.debian_sources("bookworm") == []


def test_a_machine_without_apt_has_none_either(answers):
    answers["apt-get"] = CommandError(["apt-get"], 100, "no")
    answers["apt-config"] = CommandError(["apt-config"], 100, "no")
    assert apt.debian_sources("bookworm") == []
    assert apt.acquire_options() == ""


def test_options_of_the_network_are_taken_over_and_no_others(answers):
    answers["apt-config"] = """\
APT::Architecture "amd64";
Acquire::http::Proxy "http://proxy.example:3142";
Acquire::https::Verify-Peer "true";
Acquire::Retries "3";
DPkg::Post-Invoke:: "rm -rf /";
Acquire::http::Proxy-Auto-Detect "";
"""
    assert apt.acquire_options().splitlines() == [
        'Acquire::http::Proxy "http://proxy.example:3142";',
        'Acquire::https::Verify-Peer "true";',
        'Acquire::Retries "3";',
    ]
