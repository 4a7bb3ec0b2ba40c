"""What Debian templates are made of, as far as no package is needed."""

import os

import pytest

from qubes_itests.exit_codes import ExitCode
from qubes_itests.guest.exc import NotFetchedError
from qubes_itests.guest.image.debian import RELEASES
from qubes_itests.guest.image.debian.accounts import with_lines
from qubes_itests.guest.image.debian.base import find_base
from qubes_itests.guest.image.debian.image import install_files
from qubes_itests.host.cache import Cache
from qubes_itests.run.hooks import Bundled


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Return the root filesystem of a distribution as far as it matters here."""
    etc = tmp_path / "etc"
    (etc / "systemd/system").mkdir(parents=True)
    (etc / "systemd/system/default.target").symlink_to("graphical.target")
    (etc / "passwd").write_text("root:x:0:0:root:/root:/bin/bash\nuser:x:7:7::/:/\n")
    (etc / "group").write_text("root:x:0:\n")
    (tmp_path / "usr/bin").mkdir(parents=True)
    monkeypatch.setattr("os.chown", lambda *_: None)  # unit tests need no root
    agent = tmp_path / "agent"
    agent.write_text("the agent")
    install_files(tmp_path, agent)
    return tmp_path


def test_accounts_replace_those_of_the_same_name():
    assert with_lines("a:1\nuser:old\nb:2\n", ("user:new",)) == "a:1\nb:2\nuser:new\n"


def test_the_root_has_the_users_of_a_qubes_vm(root):
    passwd = (root / "etc/passwd").read_text()
    assert passwd.count("\nuser:x:1000:1000:user:/home/user:/bin/bash\n") == 1
    assert "user:x:7" not in passwd
    assert "qubes:x:98:user" in (root / "etc/group").read_text()


def test_the_agent_is_found_at_each_of_its_names(root):
    for name in (
        "usr/bin/qrexec-client-vm",
        "usr/lib/qubes/qrexec-client-vm",
        "usr/bin/qubesdb-read",
        "usr/bin/qubesdb-list",
        "usr/bin/qubesdb-multiread",
    ):
        assert (root / name).read_text() == "the agent"


def test_systemd_starts_the_agent_and_no_login(root):
    system = root / "etc/systemd/system"
    wanted = system / "multi-user.target.wants/qubes-qrexec-agent.service"
    assert str(wanted.readlink()) == f"/{(system / wanted.name).relative_to(root)}"
    assert (system / wanted.name).is_file()
    assert system.joinpath("default.target").readlink().name == "multi-user.target"
    assert str(system.joinpath("getty.target").readlink()) == "/dev/null"


def test_programs_and_services_are_executable(root):
    for directory in ("usr/bin", "usr/sbin", "etc/qubes-rpc", "usr/lib/qubes"):
        for path in (root / directory).iterdir():
            assert path.lstat().st_mode & 0o111, path
    assert not (root / "etc/sudoers.d/qubes").stat().st_mode & 0o111


def test_all_may_read_what_is_added_whatever_the_umask(tmp_path, monkeypatch):
    monkeypatch.setattr("os.chown", lambda *_: None)
    agent = tmp_path / "agent"
    agent.write_text("the agent")
    root = tmp_path / "root"
    root.mkdir(mode=0o755)
    before = os.umask(0o077)
    try:
        install_files(root, agent)
    finally:
        os.umask(before)
    closed = [
        str(path.relative_to(root))
        for path in root.rglob("*")
        if not path.is_symlink() and path.stat().st_mode & 0o044 != 0o044
    ]
    assert closed == ["home/user"]


def test_packages_that_were_not_fetched_are_told(tmp_path):
    with pytest.raises(NotFetchedError, match="template build debian-12") as caught:
        find_base(Cache(tmp_path), RELEASES["debian-12"])
    assert caught.value.exit_code == ExitCode.NO_NETWORK


def test_names_of_releases_are_those_that_are_offered():
    """`bundled` names them itself, to be quick."""
    offered = set(Bundled().qubes_itests_templates()) - {"tiny"}
    assert offered == set(Bundled().qubes_itests_downloads()) == set(RELEASES)
