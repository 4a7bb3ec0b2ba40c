"""Files that are there as a whole, or not at all."""

import os

import pytest

from qubes_itests.whole_file import whole_file, write_output


def test_two_who_write_one_file_do_not_mix(tmp_path):
    """Processes of two sandboxes may have one number."""
    path = tmp_path / "file"
    with whole_file(path) as first:
        first.write(b"first")
        with whole_file(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert [*tmp_path.iterdir()] == [path]


def test_what_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"former")

    def write_half():
        with whole_file(path) as file:
            file.write(b"half")
            raise ValueError("half")

    with pytest.raises(ValueError, match="half"):
        write_half()
    assert path.read_bytes() == b"former"
    assert [*tmp_path.iterdir()] == [path]


def test_an_output_may_be_a_link_to_a_pipe(tmp_path):
    """As /dev/stdout is."""
    reader, writer = os.pipe()
    link = tmp_path / "stdout"
    link.symlink_to(f"/proc/self/fd/{writer}")
    write_output(link, b"data")
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert pipe.read() == b"data"
    assert link.is_symlink()
