"""Files of the machine, as a core finds them in the sandbox."""

import re
from pathlib import PurePath

from qubes_itests.dom0 import place


def test_names_in_any_encoding_stay_as_they_are(tmp_path, monkeypatch):
    users, groups = tmp_path / "passwd", tmp_path / "group"
    other = b"jo:x:4242:4242:J\xf6rg:/home/jo:/bin/sh\n"
    theirs = b"root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:\n"
    users.write_bytes(theirs + other)
    groups.write_bytes(b"qubes:x:1:\nm\xfcll:x:4243:\n")
    monkeypatch.setattr(place, "Path", lambda path: tmp_path / PurePath(path).name)
    place._have_user()
    place._have_group()
    root = b"root:x:0:0:root:/var/lib/dom0-home:/bin/sh\n"
    user = b"user:*:0:0:the user of dom0:/var/lib/dom0-home:/bin/sh\n"
    assert users.read_bytes() == root + other + user
    assert re.fullmatch(rb"m\xfcll:x:4243:\nqubes:x:\d+:user\n", groups.read_bytes())


def test_programs_are_put_into_no_directory_of_the_machine(tmp_path, monkeypatch):
    lib, theirs = tmp_path / "lib", tmp_path / "theirs"
    for each in (lib, theirs):
        each.mkdir()
    (lib / "qubes").symlink_to(theirs)
    monkeypatch.setattr(place, "_OURS", {lib: ("qrexec-client",)})
    place._have_programs(tmp_path)
    assert (lib / "qubes/qrexec-client").resolve().is_file()
    assert list(theirs.iterdir()) == []


def test_a_directory_to_mount_over_goes_with_its_last_user(tmp_path):
    mapper = tmp_path / "mapper"
    with place._kept(mapper):
        with place._kept(mapper):
            assert mapper.is_dir()
        # another sandbox has its mount there
        assert mapper.is_dir()
    assert not mapper.exists()


def test_a_directory_that_the_machine_had_stays(tmp_path):
    """Empty, too, whoever is the last."""
    mapper = tmp_path / "mapper"
    mapper.mkdir()
    with place._kept(mapper), place._kept(mapper):
        pass
    assert list(tmp_path.iterdir()) == [mapper]


def test_a_directory_that_others_remove_meanwhile_is_made_anew(tmp_path, monkeypatch):
    mapper, lock = tmp_path / "mapper", place.fcntl.flock
    removed = []

    def flock(descriptor, operation):
        lock(descriptor, operation)
        if len(removed) < 3:
            removed.append(mapper.rmdir())
            # another one may be there at once
            if len(removed) == 2:
                mapper.mkdir(0o1755)

    monkeypatch.setattr(place.fcntl, "flock", flock)
    with place._kept(mapper):
        assert mapper.is_dir()
    assert len(removed) == 3
    assert not mapper.exists()
