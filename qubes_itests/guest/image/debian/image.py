"""The root image of a release: its packages, our files, our agent."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qubes_itests.guest.exc import ImageError
from qubes_itests.guest.image.debian.accounts import add_accounts
from qubes_itests.guest.image.debian.base import base_key, find_base
from qubes_itests.guest.image.ext4 import make_root_image, root_directory
from qubes_itests.guest.image.rootfs import (
    AGENT_LINKS,
    find_tool,
    make_directory,
    write_file,
)
from qubes_itests.guest.image.settling import SETTLE
from qubes_itests.guest.image.template import Template
from qubes_itests.guest.image.tiny import build_agent, build_stage_one
from qubes_itests.host.cache import Cache, digest
from qubes_itests.host.command import CommandError, run
from qubes_itests.host.confined import confined

if TYPE_CHECKING:
    from qubes_itests.guest.image.debian.release import Release
    from qubes_itests.host.kernel import Kernel

__all__ = ["LINKS", "build_debian", "install_files"]

_HERE: Final = Path(__file__).parent
_FILES: Final = _HERE / "root"
_KIND: Final = "debian"
#: Of the filesystem, whose file is sparse: room for an app and what it needs.
_SIZE: Final = 2 << 30
_TIMEOUT: Final = 300.0
_UID: Final = 1000
_SYSTEM: Final = "etc/systemd/system"
#: What guests have besides files, and where it leads.
LINKS: Final = {
    **AGENT_LINKS,
    # by its name it knows what it is
    "usr/bin/qvm-copy": "qvm-copy-to-vm",
    "usr/bin/qvm-move": "qvm-copy-to-vm",
    "usr/bin/qvm-move-to-vm": "qvm-copy-to-vm",
    "usr/bin/qvm-open-in-dvm": "qvm-open-in-vm",
    # of whose ports the argument names one
    "etc/qubes-rpc/qubes.ConnectTCP": "/dev/tcp/127.0.0.1",
    f"{_SYSTEM}/default.target": "/usr/lib/systemd/system/multi-user.target",
    **{
        f"{_SYSTEM}/multi-user.target.wants/{unit}": f"/{_SYSTEM}/{unit}"
        for unit in ("qubes-qrexec-agent.service", "qubes-session.socket")
    },
    f"{_SYSTEM}/sysinit.target.wants/qubes-local.service": (
        f"/{_SYSTEM}/qubes-local.service"
    ),
    "etc/systemd/user/default.target.wants/qubes-session.socket": (
        "/etc/systemd/user/qubes-session.socket"
    ),
    # there is no desktop whose programs it would start
    "etc/systemd/user-generators/systemd-xdg-autostart-generator": "/dev/null",
    # nobody logs in before the system is up
    "etc/tmpfiles.d/systemd-nologin.conf": "/dev/null",
    # a VM that lives for seconds needs no login on a console and no maintenance; the
    # documentation names all of these
    **{
        f"{_SYSTEM}/{unit}": "/dev/null"
        for unit in (
            *("apt-daily-upgrade.timer", "apt-daily.timer", "dpkg-db-backup.timer"),
            *("e2scrub_all.timer", "e2scrub_reap.service", "fstrim.timer"),
            *("systemd-update-utmp.service", "systemd-update-utmp-runlevel.service"),
            # never of use here: firmware, a first boot, disks without a table
            *("systemd-firstboot.service", "systemd-machine-id-commit.service"),
            *("systemd-pcrphase.service", "systemd-pcrphase-sysinit.service"),
            *("systemd-pstore.service", "systemd-repart.service"),
            # the host gives each VM a seed, and what one leaves in the root of a
            # template would be that of all its VMs
            "systemd-random-seed.service",
            *("systemd-journald-audit.socket", "getty.target"),
        )
    },
}
_EXECUTABLE: Final = (
    *("etc/qubes-rpc", "etc/qubes/post-install.d"),
    "etc/systemd/user-environment-generators",
    *("usr/bin", "usr/lib/qubes", "usr/sbin"),
)
_DIRECTORIES: Final = (
    *("dev", "proc", "sys", "run", "rw", "home/user", "usr/lib/qubes"),
    # whose files are names of users whose sessions begin with the system
    "var/lib/systemd/linger",
)


def build_debian(cache: Cache, kernel: Kernel, release: Release) -> Template:
    """Return the template of a release, built on first use: seconds, blocking.

    :param cache: where it is kept, and the packages that it is made of.
    :param kernel: what it boots.
    :raise NotFetchedError: the packages are not in the cache; see `fetch_base`.
    :raise ImageError: it does not build.
    """
    agent = build_agent(cache)
    key = digest(
        base_key(release),
        agent,
        SETTLE,
        find_tool("busybox"),
        *(_HERE / name for name in ("accounts.py", "image.py")),
        *(_HERE.parent / name for name in ("ext4.py", "rootfs.py")),
        *(part for path in _own_files() for part in (str(path), _FILES / path)),
    )

    def build(place: Path) -> None:
        try:
            _build(place, find_base(cache, release), agent)
        except CommandError as error:
            raise ImageError(release.name, error.stderr) from error

    return Template(
        name=release.name,
        kernel=kernel.image,
        initramfs=build_stage_one(cache, kernel),
        root_image=cache.entry(_KIND, key, build) / "root.img",
    )


def _build(place: Path, base: Path, agent: Path) -> None:
    with root_directory(place) as root:
        options = ("--numeric-owner", "--xattrs", "--xattrs-include=*")
        run(
            ["tar", "-xf", base, "-C", root, *options, "--exclude=./dev/*"],
            timeout=_TIMEOUT,
        )
        root.chmod(0o755)  # the tar file has it as mmdebstrap made it
        install_files(root, agent)
        _settle(root)
        make_root_image(root, place / "root.img", _SIZE, "root", keep_times=True)


def install_files(root: Path, agent: Path) -> None:
    """Make a Qubes VM of the root filesystem of a distribution. Blocking.

    :param root: its directory; who calls is root.
    :param agent: the guest's program.
    """
    for name in _DIRECTORIES:
        make_directory(root / name)
    for path in _own_files():
        _install(_FILES / path, root / path, executable=_is_program(path))
    _install(agent, root / "usr/lib/qubes/agent", executable=True)
    for name, target in LINKS.items():
        make_directory((root / name).parent)
        (root / name).unlink(missing_ok=True)
        (root / name).symlink_to(target)
    # static, so that it starts in a fraction of the time of the user's shell
    _install(find_tool("busybox"), root / "usr/lib/qubes/sh", executable=True)
    add_accounts(root)
    os.chown(root / "home/user", _UID, _UID)
    (root / "home/user").chmod(0o700)
    for name in ("etc/machine-id", "etc/hostname", "var/lib/systemd/linger/user"):
        write_file(root / name, b"", 0o644)


def _settle(root: Path) -> None:
    mounts = "mount -t tmpfs none run && mount -t proc none proc"
    command = ("sh", "-ec", f'{mounts} && exec chroot . sh -e -c "$0"', SETTLE)
    run(confined(root, command), timeout=_TIMEOUT)


def _own_files() -> list[Path]:
    return sorted(p.relative_to(_FILES) for p in _FILES.rglob("*") if p.is_file())


def _is_program(path: Path) -> bool:
    return any(path.is_relative_to(place) for place in _EXECUTABLE)


def _install(source: Path, target: Path, *, executable: bool) -> None:
    target.unlink(missing_ok=True)
    write_file(target, source.read_bytes(), 0o755 if executable else 0o644)
