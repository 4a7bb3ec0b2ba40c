"""What guests boot from: archives, modules, root filesystems."""

import gzip
import lzma
import os
import stat
import subprocess
from pathlib import Path

import pytest

from qubes_itests.guest.exc import ImageError
from qubes_itests.guest.image.cpio import Archive
from qubes_itests.guest.image.ext4 import root_directory
from qubes_itests.guest.image.initramfs import build_initramfs
from qubes_itests.guest.image.layer.root_files import services_of
from qubes_itests.guest.image.modules import ModuleTree
from qubes_itests.guest.image.rootfs import fill_rootfs
from qubes_itests.hypervisor.console import console_tail


def make_module(directory, name, depends="", suffix=""):
    data = b"\x7fELF" + b"\0license=GPL\0depends=" + depends.encode() + b"\0name=x\0"
    path = directory / f"kernel/drivers/{name}.ko{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    packed = {"": bytes, ".xz": lzma.compress, ".gz": gzip.compress}
    if suffix == ".zst":
        data = subprocess.run(
            ["zstd", "-c"], input=data, capture_output=True, check=True
        ).stdout
    else:
        data = packed[suffix](data)
    path.write_bytes(data)


@pytest.fixture
def tree(tmp_path):
    make_module(tmp_path, "virtio-ring")
    make_module(tmp_path, "virtio", "virtio-ring")
    make_module(tmp_path, "virtio_pci", "virtio,virtio_ring,built-in", ".xz")
    make_module(tmp_path, "net", "virtio", ".gz")
    (tmp_path / "modules.builtin").write_text("kernel/lib/built_in.ko\n")
    return tmp_path


def test_an_archive_is_what_cpio_reads(tmp_path):
    archive = Archive()
    archive.directory("dir", 0o700)
    archive.file("dir/file", b"odd size\n", 0o640)
    archive.symlink("link", "dir/file")
    command = ["busybox", "cpio", "-idm"]
    subprocess.run(command, cwd=tmp_path, input=archive.to_bytes(), check=True)
    assert (tmp_path / "link").read_bytes() == b"odd size\n"
    assert stat.S_IMODE((tmp_path / "dir").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "dir/file").stat().st_mode) == 0o640


def test_an_archive_may_grow_after_it_was_read():
    archive = Archive()
    archive.file("a", b"1")
    first = archive.to_bytes()
    assert archive.to_bytes() == first
    archive.file("b", b"2")
    assert b"b\0" in archive.to_bytes()
    assert len(archive.to_bytes()) > len(first)


def test_modules_come_after_what_they_need(tree):
    """Whatever the spelling, the compression, and what the kernel has built in."""
    names = ModuleTree(tree).resolve(["virtio-pci", "net", "virtio_pci"])
    assert names == ["virtio_ring", "virtio", "virtio_pci", "net"]


@pytest.mark.parametrize("suffix", ["", ".xz", ".gz", ".zst"])
def test_modules_are_unpacked(tmp_path, suffix):
    make_module(tmp_path, "one", "", suffix)
    assert ModuleTree(tmp_path).read("one").startswith(b"\x7fELF")


def test_a_module_that_is_missing_is_named(tree):
    with pytest.raises(ImageError, match="no usable module virtio_blk"):
        ModuleTree(tree).resolve(["virtio_blk"])


def test_modules_that_need_each_other(tmp_path):
    make_module(tmp_path, "a", "b")
    make_module(tmp_path, "b", "a")
    with pytest.raises(ImageError, match="no usable module a"):
        ModuleTree(tmp_path).resolve(["a"])


def test_a_directory_without_modules(tmp_path):
    with pytest.raises(ImageError, match="there are no modules"):
        ModuleTree(tmp_path)


def test_an_initramfs_depends_on_its_contents_alone(tree, tmp_path):
    agent = tmp_path / "agent"
    agent.write_bytes(b"program")
    first = build_initramfs(agent, tree, ["net"])
    os.utime(agent, (1, 1))
    assert build_initramfs(agent, tree, ["net"]) == first
    assert b"/lib/virtio_ring.ko\n/lib/virtio.ko\n/lib/net.ko\n" in first


def test_the_root_filesystem_has_what_qubes_guests_have(tmp_path, chowned):
    agent = tmp_path / "agent"
    agent.write_bytes(b"program")
    root = tmp_path / "root"
    root.mkdir()
    fill_rootfs(root, agent)
    for name in ("qrexec-client-vm", "qubesdb-read", "qubesdb-list"):
        assert (root / "usr/bin" / name).read_bytes() == b"program"
    assert (root / "usr/lib/qubes/qrexec-client-vm").read_bytes() == b"program"
    assert os.access(root / "etc/qubes-rpc/qubes.VMShell", os.X_OK)
    assert stat.S_IMODE((root / "tmp").stat().st_mode) == 0o1777
    assert (root / "sbin/sh").readlink() == root.joinpath("busybox").relative_to(root)
    assert chowned == [(root / "home/user", 1000, 1000)]


def modes(root):
    return {
        path.relative_to(root): oct(path.lstat().st_mode)
        for path in (root, *root.rglob("*"))
    }


@pytest.mark.usefixtures("chowned")
def test_the_caller_has_no_say_in_the_modes_of_a_root(tmp_path):
    """Neither by the umask nor by what the cache's directory hands down."""
    agent = tmp_path / "agent"
    agent.write_bytes(b"program")
    seen = []
    for umask, mode in ((0o022, 0o755), (0o077, 0o2700)):
        (tmp_path / f"{umask}").mkdir()
        (tmp_path / f"{umask}").chmod(mode)
        before = os.umask(umask)
        try:
            with root_directory(tmp_path / f"{umask}") as root:
                fill_rootfs(root, agent)
                seen.append(modes(root))
        finally:
            os.umask(before)
    assert seen[0] == seen[1]
    assert seen[0][Path("usr/lib/qubes")] == oct(stat.S_IFDIR | 0o755)


@pytest.fixture
def chowned(monkeypatch):
    """Record changes of owner, which only root may make."""
    calls = []
    monkeypatch.setattr(os, "chown", lambda *call: calls.append(call))
    return calls


@pytest.mark.parametrize(
    "words", [["echo", "a b", "-x", "", "ü*$'\\"], ["printf", "%s\\n", "+", "--41"]]
)
def test_vmexec_takes_the_words_as_qubes_encodes_them(tmp_path, chowned, words):
    """The script, run by busybox, executes just these words."""
    assert not chowned
    agent = tmp_path / "agent"
    agent.write_bytes(b"")
    root = tmp_path / "root"
    root.mkdir()
    fill_rootfs(root, agent)
    script = root / "etc/qubes-rpc/qubes.VMExec"
    done = subprocess.run(
        ["busybox", "sh", script, "+".join(map(encode_word, words))],
        capture_output=True,
        check=True,
    )
    assert done.stdout == subprocess.run(words, capture_output=True, check=True).stdout


def encode_word(word):
    """Encode as clients of qubes.VMExec do."""
    return "".join(
        "--"
        if byte == ord("-")
        else chr(byte)
        if chr(byte).isascii() and (chr(byte).isalnum() or chr(byte) in "._")
        else f"-{byte:02X}"
        for byte in word.encode()
    )


class Console:
    def __init__(self, path, *, panicked=False):
        self.path = path
        self.panicked = panicked

    def console_log(self):
        return self.path


def test_the_end_of_a_console_is_short_and_harmless(tmp_path):
    path = tmp_path / "console"
    assert console_tail(Console(path)) == ""
    path.write_bytes(b"\xff\x1b[31mline\r\n" * 100_000)
    tail = console_tail(Console(path))
    assert len(tail.splitlines()) == 20
    assert "\x1b" not in tail


def test_the_end_of_a_console_is_where_a_panic_begins(tmp_path):
    path = tmp_path / "console"
    trace = "\n".join(f"register {number}" for number in range(50))
    path.write_text(f"last words\nKernel panic - not syncing: why\n{trace}\n")
    lines = console_tail(Console(path, panicked=True)).splitlines()
    assert lines[:2] == ["last words", "Kernel panic - not syncing: why"]
    assert len(lines) == 20
    # one that a program has printed hides nothing
    assert console_tail(Console(path)).splitlines()[-1] == "register 49"


def test_services_in_an_image_are_its_programs(tmp_path):
    place = tmp_path / "root/etc/qubes-rpc"
    place.mkdir(parents=True)
    for name, mode in {
        "a.B": 0o755,
        "a.B+c": 0o755,
        "a.C+d": 0o711,
        "no": 0o644,
    }.items():
        (place / name).touch()
        (place / name).chmod(mode)
    (place / "link").symlink_to("/dev/tcp/127.0.0.1")
    (place / "folder").mkdir()
    image = tmp_path / "root.img"
    command = ["mke2fs", "-q", "-t", "ext4", "-d", tmp_path / "root", image, "4M"]
    subprocess.run(command, check=True)
    assert services_of(image) == ["a.B", "a.C"]
