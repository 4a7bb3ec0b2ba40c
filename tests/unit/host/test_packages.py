"""The table of packages, as Python and as the scripts read it."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from qubes_itests.host import packages

_ROOT = Path(__file__).parents[3]


def test_every_line_is_whole():
    """Also names a package of each distribution."""
    assert len(packages.needs()) > 20
    for need in packages.needs():
        assert need.kind in ("tool", "static", "file", "guest", "test"), need
        assert need.name, need
        assert need.purpose, need
        assert set(need.packages) == {"debian", "ubuntu"}, need
        for name in need.packages.values():
            assert re.fullmatch(r"[a-z0-9][a-z0-9.+-]+", name), need


def test_the_scripts_find_the_same(tmp_path):
    """For each need, and for one that is absent, shell and Python agree."""
    absent = packages.Need("file", f"{tmp_path}/none/*", "", {})
    needs = [*packages.needs_here(), absent, packages.Need("tool", "no-such", "", {})]
    script = 'set +e; . "$0"; set +e; for n; do present "$n" ""; echo $?; done'
    words = [f"{need.kind}:{need.name}" for need in needs]
    output = subprocess.run(
        ["bash", "-c", script, _ROOT / "setup.sh", *words],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    ).stdout.split()
    assert [status == "0" for status in output] == [need.present() for need in needs]
    assert output[-2:] == ["1", "1"]


def test_what_only_tests_need_is_for_those_who_run_them():
    """Neither `doctor` nor a run asks for it, and it is there now."""
    of_tests = [need for need in packages.needs() if need.kind == "test"]
    assert of_tests
    assert not [need for need in packages.needs_here() if need in of_tests]
    script = '. "$0"; PATH= ; ! present test:none dev; present test:none ""; echo done'
    shell = ["bash", "-c", script, _ROOT / "setup.sh"]
    done = subprocess.run(
        shell, capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout == "done\n"
    assert all(shutil.which(need.name) for need in of_tests)


def test_a_dynamic_program_is_not_static():
    shell = Path(shutil.which("bash"))
    assert not packages.is_static(shell.resolve())
    assert not packages.is_static(_ROOT / "itests")


def test_a_static_program_is(tmp_path):
    source = tmp_path / "main.c"
    source.write_text("int main(void) { return 0; }\n")
    program = tmp_path / "main"
    subprocess.run(["gcc", "-static", "-o", program, source], check=True, timeout=300)
    assert packages.is_static(program)


@pytest.mark.parametrize(
    ("release", "expected"),
    [
        ({"ID": "debian"}, "debian"),
        ({"ID": "ubuntu", "ID_LIKE": "debian"}, "ubuntu"),
        ({"ID": "linuxmint", "ID_LIKE": "ubuntu debian"}, "ubuntu"),
        ({"ID": "fedora"}, None),
    ],
)
def test_distribution(monkeypatch, release, expected):
    monkeypatch.setattr("platform.freedesktop_os_release", lambda: release)
    assert packages.distribution() == expected


def test_the_command_that_installs(monkeypatch):
    needs = [n for n in packages.needs() if n.name in ("mkfs.xfs", "mount", "losetup")]
    monkeypatch.setattr(packages, "distribution", lambda: "debian")
    command = packages.install_command(needs)
    assert command == "apt-get install --no-install-recommends mount xfsprogs"
    monkeypatch.setattr(packages, "distribution", lambda: None)
    assert packages.install_command(needs) == "Install: mkfs.xfs, losetup, mount"
