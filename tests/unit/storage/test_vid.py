from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qubes_storage.exc import InvalidVolumeConfigError
from qubes_storage.layout import VolumeFiles, check_vid


@pytest.mark.parametrize(
    "vid",
    ["appvms/work/private", "vm-templates/debian-12/root", "appvms/a_b/x.y+z", "0/1/2"],
)
def test_ordinary_ids_are_accepted(vid):
    assert check_vid(vid) == vid


@pytest.mark.parametrize(
    "vid",
    [
        "",
        "private",
        "appvms/work",
        "appvms/work/extra/private",
        "/appvms/work/private",
        "appvms//private",
        "appvms/../private",
        "../appvms/private",
        "appvms/work/..",
        "appvms/work/.hidden",
        "appvms/work/private\n",
        "appvms/work\n/private",
        "appvms/wörk/private",
        "appvms/work/private\0",
        "appvms/work/-private",
        "appvms/work/" + "x" * 300,
        "appvms/work/private@1",
        "appvms/work/private~12345678",
        "appvms/work/private-dirty",
        "appvms/work/private-import",
        "appvms/work/private-precache",
        "appvms/work/private-origin",
        None,
        7,
        b"appvms/work/private",
    ],
)
def test_what_is_no_id_is_refused(vid):
    with pytest.raises(InvalidVolumeConfigError):
        check_vid(vid)


@given(st.text())
@example("a/b/c")
def test_an_accepted_id_never_leaves_its_pool(vid):
    """Whatever the text, its files lie two directories below the pool."""
    try:
        check_vid(vid)
    except InvalidVolumeConfigError:
        return
    path = f"/pool/{vid}"
    assert os.path.normpath(path) == path
    assert path.count("/") == 4
    assert path.isprintable()


_NAMES = st.from_regex(r"[a-c](-dirty|-import|\.img|-|\.|~)?", fullmatch=True)


@given(one=_NAMES, other=_NAMES)
def test_no_two_volumes_share_a_file(one, other, tmp_path_factory):
    """The files of a volume are never taken for those of another."""
    try:
        for name in (one, other):
            check_vid(f"appvms/work/{name}")
    except InvalidVolumeConfigError:
        return
    if one == other:
        return
    directory = tmp_path_factory.mktemp("vm")
    mine = VolumeFiles(directory, one)
    theirs = VolumeFiles(directory, other)
    for path in (mine.clean, mine.dirty, mine.precache, mine.imported, mine.origin):
        path.touch()
        path.with_name(f"{path.name}~01234567").touch()
    mine.clean.with_name(f"{mine.clean.name}.1@2026-01-02T03:04:05Z").touch()
    assert not theirs.revisions()
    assert not [path for path in theirs.leftovers() if path.exists()]


@pytest.mark.parametrize("name", ["..", "a/b", "new\nline", ".dot", "x" * 300, ""])
@pytest.mark.parametrize("part", ["name", "dir_path_prefix"])
def test_a_bad_name_of_a_vm_makes_no_volume(shop, name, part):
    vm = SimpleNamespace(**{"name": "work", "dir_path_prefix": "appvms", part: name})
    with pytest.raises(InvalidVolumeConfigError):
        shop.pool.init_volume(vm, {"name": "private", "save_on_stop": True})
    assert not shop.pool.list_volumes()
