"""The guests' kernel: unpacked from real packages, fetched by a real apt."""

import gzip
import hashlib
import lzma
import subprocess
from pathlib import Path

import pytest

from qubes_itests.guest.image.modules import ModuleTree
from qubes_itests.host import packages
from qubes_itests.host.cache import Cache
from qubes_itests.host.exc import NoKernelError, NoNetworkError
from qubes_itests.host.kernel import GENERIC, fetch, find_kernel, main, unpack


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.delenv("QUBES_ITESTS_KERNEL", raising=False)
    return Cache(tmp_path / "cache")


@pytest.fixture
def deb(tmp_path):
    """Make a package of files."""

    def make(name: str, files: dict[str, bytes], *, depends: str = "") -> Path:
        tree = tmp_path / "trees" / name
        control = f"Package: {name}\nVersion: 1:2-3\nArchitecture: all\n"
        control += "Maintainer: nobody <nobody@localhost>\nDescription: test\n"
        control += f"Depends: {depends}\n" if depends else ""
        for path, data in {"DEBIAN/control": control.encode(), **files}.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_bytes(data)
        archive = tmp_path / "archive" / f"{name}.deb"
        archive.parent.mkdir(exist_ok=True)
        command = ["dpkg-deb", "--root-owner-group", "--build", tree, archive]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        return archive

    return make


def _kernel_files(version: str) -> dict[str, bytes]:
    return {
        f"boot/vmlinuz-{version}": b"image",
        f"lib/modules/{version}/kernel/a.ko": b"module a",
        "usr/share/doc/readme": b"not wanted",
    }


def _tree(root: Path, version: str) -> None:
    for name, data in _kernel_files(version).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def test_unpack_keeps_image_and_modules(deb, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    kernel = unpack([deb("linux-image-1.2", _kernel_files("1.2"))], place)
    assert kernel.version == "1.2"
    assert kernel.image.read_bytes() == b"image"
    assert (kernel.modules / "kernel/a.ko").read_bytes() == b"module a"
    assert sorted(path.name for path in place.iterdir()) == ["boot", "lib"]


def test_unpack_joins_packages(deb, tmp_path):
    """As in Ubuntu: image and modules come apart, under /usr."""
    place = tmp_path / "place"
    place.mkdir()
    image = deb("linux-image-1.2", {"boot/vmlinuz-1.2": b"image"})
    modules = deb("linux-modules-1.2", {"usr/lib/modules/1.2/kernel/a.ko": b"module"})
    kernel = unpack([image, modules], place)
    assert (kernel.modules / "kernel/a.ko").read_bytes() == b"module"


def test_a_package_without_kernel_is_refused(deb, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    with pytest.raises(NoKernelError, match=r"linux-doc\.deb"):
        unpack([deb("linux-doc", {"usr/share/doc/x": b""})], place)


def test_the_newest_of_the_cache_is_taken(cache, tmp_path):
    for version in ("6.9.1-a", "6.10.0-a", "6.1.99-a"):
        cache.entry("kernel", version, lambda place, v=version: _tree(place, v))
    _tree(tmp_path / "host", "9.9")
    assert find_kernel(cache, host=tmp_path / "host").version == "6.10.0-a"


def test_the_hosts_own_is_only_a_last_resort(cache, tmp_path):
    _tree(tmp_path / "host", "9.9")
    assert find_kernel(cache, host=tmp_path / "host").version == "9.9"


def test_without_any_the_error_says_how_to_get_one(cache, tmp_path):
    with pytest.raises(NoKernelError, match="kernel fetch") as caught:
        find_kernel(cache, host=tmp_path)
    assert caught.value.exit_code == 14


def test_an_image_without_modules_does_not_count(cache, tmp_path):
    _tree(tmp_path / "host", "9.9")
    (tmp_path / "host/boot/vmlinuz-10.0").touch()
    assert find_kernel(cache, host=tmp_path / "host").version == "9.9"


def test_the_environment_overrides(cache, tmp_path, monkeypatch):
    cache.entry("kernel", "1.0", lambda place: _tree(place, "1.0"))
    _tree(tmp_path / "mine", "5.5")
    image = tmp_path / "mine/boot/vmlinuz-5.5"
    monkeypatch.setenv("QUBES_ITESTS_KERNEL", str(image))
    assert find_kernel(cache).image == image
    assert find_kernel(cache).version == "5.5"
    plain = image.rename(tmp_path / "bzImage")
    modules = tmp_path / "mine/lib/modules/5.5"
    monkeypatch.setenv("QUBES_ITESTS_KERNEL", f"{plain}:{modules}")
    assert find_kernel(cache).version == "5.5"
    monkeypatch.setenv("QUBES_ITESTS_KERNEL", str(plain))
    with pytest.raises(NoKernelError, match="QUBES_ITESTS_KERNEL names"):
        find_kernel(cache)


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """Point apt at a package archive of our own, which is empty at first."""
    directory = tmp_path / "archive"
    directory.mkdir(exist_ok=True)
    state = tmp_path / "apt"
    for sub in ("state/lists/partial", "cache/archives/partial", "parts"):
        (state / sub).mkdir(parents=True)
    (state / "status").touch()
    (state / "sources.list").write_text(f"deb [trusted=yes] file:{directory} ./\n")
    (state / "apt.conf").write_text(
        f'Dir::State "{state}/state"; Dir::State::status "{state}/status";\n'
        f'Dir::Cache "{state}/cache"; Dir::Etc::sourcelist "{state}/sources.list";\n'
        f'Dir::Etc::sourceparts "{state}/parts"; Acquire::Languages "none";\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(state / "apt.conf"))
    monkeypatch.setattr(packages, "distribution", lambda: "debian")
    return directory


def _index(directory: Path) -> None:
    entries = []
    for file in sorted(directory.glob("*.deb")):
        control = subprocess.run(
            ["dpkg-deb", "--field", file], capture_output=True, check=True, text=True
        ).stdout
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        entries.append(
            f"{control}Filename: ./{file.name}\nSize: {file.stat().st_size}\n"
            f"SHA256: {sha256}\n"
        )
    (directory / "Packages").write_text("\n".join(entries))


def _offer_kernel(deb, directory: Path) -> None:
    deb("linux-image-cloud-amd64", {}, depends="linux-image-1.2-cloud, linux-base")
    deb(
        "linux-image-1.2-cloud",
        {"boot/vmlinuz-1.2-cloud": b"image"},
        depends="linux-modules-1.2-cloud",
    )
    module = {"lib/modules/1.2-cloud/a.ko.gz": gzip.compress(b"a")}
    deb("linux-modules-1.2-cloud", module)
    deb("linux-base", {})
    _index(directory)


def _offer_generic_kernel(deb, directory: Path) -> None:
    names = [f"linux-{kind}-1.3-generic" for kind in ("image", "modules-extra")]
    deb("linux-image-amd64", {}, depends=", ".join(names))
    deb(names[0], _kernel_files("1.3-generic"))
    more = "lib/modules/1.3-generic/kernel/more.ko.xz"
    deb(names[1], {more: lzma.compress(b"more")})
    _index(directory)


def test_the_generic_kernel_is_another_one_with_compressed_modules(
    cache, archive, deb, capsys, monkeypatch
):
    _offer_kernel(deb, archive)
    _offer_generic_kernel(deb, archive)
    with pytest.raises(NoKernelError, match="kernel fetch generic"):
        find_kernel(cache, GENERIC)
    default, generic = fetch(cache), fetch(cache, GENERIC)
    assert (default.version, generic.version) == ("1.2-cloud", "1.3-generic")
    assert (find_kernel(cache), find_kernel(cache, GENERIC)) == (default, generic)
    modules = sorted(path.name for path in generic.modules.rglob("*.ko*"))
    assert modules == ["a.ko.zst", "more.ko.xz"]
    tree = ModuleTree(generic.modules)
    assert (tree.read("a"), tree.read("more")) == (b"module a", b"more")
    monkeypatch.setenv("QUBES_ITESTS_CACHE", str(cache.root))
    monkeypatch.setenv("QUBES_ITESTS_KERNEL", "/another/default")
    assert main(["fetch", "generic"]) == 0
    assert capsys.readouterr().out == "kernel for guests: 1.3-generic\n"


def test_fetch_downloads_image_and_modules_and_installs_nothing(cache, archive, deb):
    """From the meta package to the unpacked kernel; a second fetch downloads none.

    Its modules are not compressed, as they are read whenever a first stage is made.
    """
    _offer_kernel(deb, archive)
    kernel = fetch(cache)
    assert kernel.version == "1.2-cloud"
    assert (kernel.modules / "a.ko").read_bytes() == b"a"
    key = "linux-image-1.2-cloud_1-2-3"
    assert [entry.name for entry in cache.entries("kernel")] == [key]
    for file in archive.glob("*.deb"):
        file.unlink()
    assert fetch(cache) == kernel


def test_fetch_without_network_is_told_from_other_failures(cache, archive):
    archive.rmdir()
    with pytest.raises(NoNetworkError, match="package lists") as caught:
        fetch(cache)
    assert caught.value.exit_code == 15


def test_fetch_without_network_is_content_with_an_older_kernel(cache, archive):
    archive.rmdir()
    cache.entry("kernel", "old", lambda place: _tree(place, "0.9"))
    assert fetch(cache).version == "0.9"


def test_a_download_that_is_gone_leaves_no_entry(cache, archive, deb):
    _offer_kernel(deb, archive)
    subprocess.run(["apt-get", "update"], check=True, capture_output=True, timeout=300)
    (archive / "linux-modules-1.2-cloud.deb").unlink()
    with pytest.raises(NoNetworkError, match=r"linux-modules-1\.2-cloud"):
        fetch(cache)
    assert cache.entries("kernel") == []


def test_the_command_that_the_scripts_call(cache, archive, deb, monkeypatch, capsys):
    monkeypatch.setenv("QUBES_ITESTS_CACHE", str(cache.root))
    assert main(["fetch"]) == 15
    assert "could not be downloaded" in capsys.readouterr().err
    _offer_kernel(deb, archive)
    assert main(["fetch"]) == 0
    assert capsys.readouterr().out == "kernel for guests: 1.2-cloud\n"
    for wrong in ([], ["fetch", "other"], ["fetch", "generic", "more"], ["generic"]):
        assert main(wrong) == 4
