"""Which files of a source tree count, and when they have changed."""

import os
import socket
from pathlib import Path

import pytest

from qubes_itests.host.tree import files_of, tree_digest


@pytest.fixture
def tree(tmp_path):
    for name in (".git", "src/__pycache__", "x.egg-info", ".venv", ".mypy_cache"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").touch()
    (tmp_path / "src/main.c").write_text("int main;")
    (tmp_path / "src/main.pyc").touch()
    (tmp_path / "link").symlink_to("src")
    os.mkfifo(tmp_path / "fifo")
    return tmp_path


def test_what_was_built_and_the_history_do_not_count(tree):
    assert files_of(tree) == [Path("link"), Path("src"), Path("src/main.c")]


def test_a_socket_does_not_count(tmp_path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(tmp_path / "s"))
    assert files_of(tmp_path) == []


def test_a_file_is_itself(tree):
    assert files_of(tree / "src/main.c") == [Path()]
    assert tree_digest(tree / "src/main.c") != tree_digest(tree / "src")


CHANGES = {
    "contents": lambda tree: (tree / "src/main.c").write_text("int main2;"),
    "name": lambda tree: (tree / "src/main.c").rename(tree / "src/other.c"),
    "mode": lambda tree: (tree / "src/main.c").chmod(0o755),
    "directory": lambda tree: (tree / "new").mkdir(),
    "link": lambda tree: ((tree / "link").unlink(), (tree / "link").symlink_to("x")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_gives_another_key(tree, change):
    before = tree_digest(tree)
    CHANGES[change](tree)
    assert tree_digest(tree) != before


def test_names_need_not_be_utf_8(tree):
    """What git has is bytes."""
    before = tree_digest(tree)
    name = os.fsdecode(b"src/\xff\xe9.txt")
    (tree / name).touch()
    assert Path(name) in files_of(tree)
    first = tree_digest(tree)
    (tree / name).rename(tree / os.fsdecode(b"src/\xfe\xe9.txt"))
    assert len({before, first, tree_digest(tree)}) == 3


def test_what_does_not_count_gives_the_same_key(tree):
    before = tree_digest(tree)
    (tree / ".git/HEAD").write_text("x")
    (tree / "src/__pycache__/y.pyc").write_text("x")
    os.utime(tree / "src/main.c", (1, 1))
    assert tree_digest(tree) == before


@pytest.fixture
def vanishing(tree, monkeypatch):
    """Have a file of the tree vanish between its listing and its reading."""
    file, read = tree / "src/main.c", Path.lstat
    (tree / "src/other.c").touch()

    def lstat(path):
        file.unlink(missing_ok=True)
        return read(path)

    monkeypatch.setattr(Path, "lstat", lstat)
    return tree


def test_a_file_that_vanishes_meanwhile_does_not_count(vanishing):
    digest = tree_digest(vanishing)
    assert not (vanishing / "src/main.c").exists()
    assert tree_digest(vanishing) == digest


def test_a_tree_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        tree_digest(tmp_path / "nowhere")
