"""What VMs of a core under test have for its backups, and how dom0 receives them."""

import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import guest_scripts
import pytest

import qubes_itests
from qubes_itests.dom0.programs import PROGRAMS

TEMPLATE = Path(qubes_itests.__file__).with_name("repository") / "core_template"
AGENT = "usr/lib/qubes/qfile-agent"
LARGE = os.urandom(300_000)


@pytest.fixture
def root(tmp_path):
    """Return what a guest has of these in its root."""
    place = shutil.copytree(TEMPLATE, tmp_path / "root")
    (place / AGENT).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(guest_scripts.ROOT / AGENT, place / AGENT)
    return place


@pytest.fixture
def backup(tmp_path):
    """Return a backup: an archive of each of its files, one after the other."""
    path = tmp_path / "a backup"
    with path.open("wb") as file:
        for name in ("header", "header.sum", "vm1/root.000", "vm1/root.001", "vm2/x"):
            content = LARGE if "root" in name else name.encode()
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), 7.5
            with tarfile.open(fileobj=file, mode="w|") as archive:
                archive.addfile(member, io.BytesIO(content))
    return path


def restore(root, place, wanted, directory, **limits):
    """Have dom0 receive some files.

    :return: the names that it tells, its status, that of the VM, and what this says.
    """
    directory.mkdir()
    link = directory.with_name("unpacker")
    link.symlink_to(PROGRAMS / "qfile-dom0-unpacker")
    source = subprocess.Popen(
        [sys.executable, root / "etc/qubes-rpc/qubes.Restore"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    source.stdin.write(f"{place}\n{wanted}\n".encode())
    source.stdin.flush()
    words = [link, str(os.getuid()), directory, "-v", "-w", "1000"]
    unpacker = subprocess.Popen(
        words,
        stdin=source.stdout,
        stdout=source.stdin,
        stderr=subprocess.PIPE,
        env={**os.environ, "QUBES_ITESTS_PYTHON": sys.executable, **limits},
    )
    source.stdout.close()
    source.stdin.close()
    _, names = unpacker.communicate(timeout=300)
    said = source.stderr.read().decode()
    source.stderr.close()
    return names.decode().split(), unpacker.returncode, source.wait(300), said


def test_files_of_a_backup_are_restored_by_how_their_names_begin(
    root, backup, tmp_path
):
    found = restore(root, backup, "vm1/ header.s", tmp_path / "got")
    assert found == (["header.sum", "vm1/root.000", "vm1/root.001"], 0, 0, "")
    got = tmp_path / "got"
    assert (got / "vm1/root.001").read_bytes() == LARGE
    assert (got / "header.sum").stat().st_mtime == 7.5
    assert {path.name for path in got.iterdir()} == {"header.sum", "vm1"}


def test_no_more_of_a_command_is_read_than_is_asked_for(root, backup, tmp_path):
    """It would never come to an end."""
    place = f"env {300 * 'A'}= cat '{backup}' /dev/zero"
    found = restore(root, place, "header", tmp_path / "got")
    assert found == (["header", "header.sum"], 0, 0, "")


@pytest.mark.parametrize(
    "limits", [{"UPDATES_MAX_FILES": "2"}, {"UPDATES_MAX_BYTES": "100"}]
)
def test_dom0_takes_no_more_than_it_has_said(root, backup, tmp_path, limits):
    found = restore(root, backup, "", tmp_path / "got", **limits)
    assert found == (["header", "header.sum"], 1, 0, "")


@pytest.mark.parametrize("place", ["/nowhere/x", "a 'quote", "sh -c 'echo no backup'"])
def test_what_is_no_backup_is_told(root, tmp_path, place):
    names, received, status, said = restore(root, place, "header", tmp_path / "got")
    assert (names, received, status) == ([], 1, 1)
    assert re.match("qubes.Restore: .", said)


def keep(root, place, data=b"what is kept"):
    service = root / "etc/qubes-rpc/qubes.Backup"
    given = f"{place}\n".encode() + data
    return subprocess.run([service], input=given, capture_output=True, check=False)


def test_a_backup_is_kept_in_a_directory_or_by_a_command(root, tmp_path):
    place = tmp_path / "two words"
    place.mkdir()
    assert keep(root, place).returncode == 0
    (file,) = place.glob("qubes-backup-20*")
    assert file.read_bytes() == b"what is kept"
    target = tmp_path / "by 'dd'"
    assert keep(root, f'dd of="{target}"').returncode == 0
    assert target.read_bytes() == b"what is kept"


@pytest.mark.parametrize("place", ["dd of=/dev/full", "never-heard-of", "/nowhere", ""])
def test_a_backup_that_cannot_be_kept_is_told(root, place):
    assert keep(root, place).returncode not in (0, None)
