"""Whether two files hold the same, told by where their data are."""

import os

import pytest

from qubes_storage.ficlone import clone, places_of_data

MIB = 1 << 20


@pytest.fixture(params=["btrfs", "xfs"])
def image(request):
    """Return a file with two stretches of data, on a filesystem with reflinks."""
    path = request.getfixturevalue(request.param) / "image"
    with path.open("wb") as file:
        for place in (0, 5 * MIB):
            file.seek(place)
            file.write(os.urandom(MIB))
        file.truncate(8 * MIB)
    return path


def places(path):
    with path.open("rb") as file:
        return places_of_data(file.fileno())


@pytest.fixture
def copy(image):
    path = image.with_name("clone")
    with image.open("rb") as source, path.open("wb") as target:
        assert clone(source.fileno(), target.fileno())
    return path


def test_a_clone_has_its_data_in_the_same_places(image, copy):
    assert sum(length for _, _, length in places(copy)) >= 2 * MIB
    assert places(copy) == places(image)
    with copy.open("r+b") as file:
        file.truncate(16 * MIB)  # of a larger volume
    assert places(copy) == places(image)


@pytest.mark.parametrize("place", [0, 4096, 3 * MIB, 6 * MIB - 1])
def test_one_byte_that_is_written_tells_them_apart(image, copy, place):
    """Also before it is on the disk, and if it is the byte that was there."""
    with copy.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(byte)
    assert places(copy) != places(image)


def test_a_copy_with_the_same_data_is_another(image):
    path = image.with_name("copied")
    path.write_bytes(image.read_bytes())
    assert places(path) != places(image)


def test_data_that_are_nowhere_or_in_a_reserved_place_are_not_told(copy):
    """What is written there stays in that place, in one of the files alone."""
    with copy.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 12 * MIB, MIB)
    assert places(copy) is None


def test_a_filesystem_that_cannot_tell(tmpfs):
    path = tmpfs / "file"
    path.write_bytes(bytes(4096))
    assert places(path) is None
