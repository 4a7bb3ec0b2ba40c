"""The directories of dom0, as one sandbox has them."""

from __future__ import annotations

import contextlib
import fcntl
import grp
import os
import shutil
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qubes_itests.dom0.snapshots import MAPPER
from qubes_itests.host import sandbox
from qubes_itests.host.command import run
from qubes_itests.host.loop import detach_loop_devices

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = [
    "HOME",
    "UNITS",
    "VAR_LIB_QUBES",
    "WANTED_UNITS",
    "directories_of_suites",
    "dom0_directories",
]

VAR_LIB_QUBES: Final = Path("/var/lib/qubes")
_ETC_SYSTEMD: Final = Path("/etc/systemd")
#: What systemd starts with dom0: links to units.
WANTED_UNITS: Final = _ETC_SYSTEMD / "system/multi-user.target.wants"
#: Those that there are.
UNITS: Final = Path("/usr/lib/systemd/system")
_ETC_QUBES: Final = Path("/etc/qubes")
_POLICY: Final = "policy.d/90-default.policy"
#: Where files of policy are, by the first part of their names.
_POLICIES: Final = {
    "policy.d": _ETC_QUBES / "policy.d",
    # the older format, which the default policy includes
    "policy": Path("/etc/qubes-rpc/policy"),
}
#: Of the user of dom0: backups have it with all that is in it, and change its owner.
HOME: Final = Path("/var/lib/dom0-home")
_IMPORT: Final = "admin.vm.volume.Import"
_GROUP: Final = "qubes"
_USER: Final = "user"
#: What of a checkout is in dom0's /usr/lib/qubes.
_AUX_TOOLS: Final = "linux/aux-tools"
_LIB: Final = Path("/usr/lib")
_LIBEXEC: Final = Path("/usr/libexec")
#: Of our programs, those that are called there.
_OURS: Final = {
    _LIB: ("create-snapshot", "destroy-snapshot", "qrexec-client"),
    _LIBEXEC: ("qfile-dom0-unpacker",),
}
#: Of a directory that sandboxes make on the machine, and know by its sticky bit.
_MADE_HERE: Final = 0o755 | stat.S_ISVTX
#: Names in the machine's files are in any encoding.
_AS_IT_IS: Final[Mapping[str, str]] = {"encoding": "utf-8", "errors": "surrogateescape"}

#: Has a directory, $1, on a filesystem of this namespace alone. What the machine has in
#: there is seen by links to a read-only mount of it; its links are copied. Else each
#: of hundreds would be a mount; and an overlay cannot lie over those of a container.
#: With $2, a name under which the machine's is not seen, only files are links, and
#: directories mounts: those of programs have links in them that lead out of $1.
_OWN: Final = """\
new=$(mktemp -d -p /run)
mount -t tmpfs -o mode=755 none "$new"
mkdir "$new/.machine"
mount --rbind "$1" "$new/.machine"
mount -o remount,bind,ro "$new/.machine"
cd "$new"
find .machine -mindepth 1 -maxdepth 1 -type l -exec cp -P -t . {} +
linked="! -type l"
if [ -n "$2" ]; then
    linked="-type f"
    find .machine -mindepth 1 -maxdepth 1 -type d ! -name "$2" -exec sh -ec '
        for each; do
            mkdir "${each##*/}"
            mount --rbind "$each" "${each##*/}"
        done' sh {} +
fi
find .machine -mindepth 1 -maxdepth 1 $linked -exec ln -s -t . {} +
cd /
mount --move "$new" "$1"
rmdir "$new"
"""


@contextlib.contextmanager
def dom0_directories(
    storage: Path, checkout: Path, policy: Mapping[str, Path]
) -> Iterator[None]:
    """Have /etc and /var/lib as a core expects them, in this sandbox. Blocking.

    Only /var/lib/qubes, /var/tmp and `HOME` are undone: all else ends with the sandbox.

    :param storage: an empty directory for what is in those three.
    :param checkout: of core-admin, with templates of libvirt's XML, and policy.
    :param policy: more files of policy, by ``policy.d/NAME`` or, in the format of
        Qubes OS 4.0, ``policy/SERVICE``; one may replace that of the checkout.
    :raise EnvironmentNotReadyError: outside a sandbox.
    """
    sandbox.require()
    places = dict.fromkeys((_LIB, _LIBEXEC), "qubes")
    places |= dict.fromkeys((Path("/etc"), VAR_LIB_QUBES.parent, UNITS), "")
    for place, apart in places.items():
        if place.is_dir() and not (place / ".machine").is_dir():
            run(["sh", "-ec", _OWN, "sh", place, apart], timeout=30)
    for own in (_ETC_QUBES, VAR_LIB_QUBES, HOME, _ETC_SYSTEMD):
        if own.is_symlink():
            own.unlink()  # the machine's
        own.mkdir(exist_ok=True)
    _have_units(checkout / "linux/systemd")
    shown = _ETC_QUBES / "templates"
    shown.unlink(missing_ok=True)
    shown.symlink_to(checkout / "templates")
    _have_services(checkout, policy)
    _have_programs(checkout)
    # by which the client of Qubes OS knows dom0, where it asks qubesd itself
    release = Path("/etc/qubes-release")
    release.unlink(missing_ok=True)
    release.write_text("what qubes_itests has in place of Qubes OS\n")
    zone = Path("/etc/localtime")
    if "zoneinfo" not in os.fspath(zone.resolve()):
        # a core takes the name of the time zone from where the link leads
        zone.unlink(missing_ok=True)
        zone.symlink_to("/usr/share/zoneinfo/UTC")
    _have_group()
    _have_user()
    with contextlib.ExitStack() as undo:
        undo.enter_context(directories_of_suites(storage))
        _mount(VAR_LIB_QUBES, storage / "qubes", undo)
        _mount(HOME, storage / "home", undo)
        undo.enter_context(_kept(MAPPER))
        run(["mount", "-t", "tmpfs", "-o", "mode=755", "none", MAPPER], timeout=30)
        undo.callback(run, ["umount", "--lazy", MAPPER], timeout=30)
        yield


@contextlib.contextmanager
def directories_of_suites(storage: Path) -> Iterator[None]:
    """Have what suites expect of any dom0, in this sandbox, until the end. Blocking.

    That is a /var/tmp for filesystems, which a test that fails leaves there, in the way
    of the next run. And sh is bash: tests expect that `sh -c COMMAND` becomes COMMAND.
    With another shell its outputs stay open for as long as that waits for the command.

    :param storage: an empty directory for what is in /var/tmp.
    """
    bash, shell = shutil.which("bash", path=os.defpath), Path("/bin/sh").resolve()
    with contextlib.ExitStack() as undo:
        _mount(Path("/var/tmp"), storage / "tmp", undo, mode=0o1777)  # noqa: S108
        if bash is not None and not shell.samefile(bash):
            run(["mount", "--bind", bash, shell], timeout=30)
            undo.callback(run, ["umount", "--lazy", shell], timeout=30)
        yield


def _mount(
    place: Path, source: Path, undo: contextlib.ExitStack, mode: int = 0o755
) -> None:
    source.mkdir()
    source.chmod(mode)
    run(["mount", "--bind", source, place], timeout=30)
    undo.callback(run, ["umount", "--lazy", place], timeout=30)
    # first, or the filesystem of the run could not be unmounted
    undo.callback(detach_loop_devices, place)


@contextlib.contextmanager
def _kept(place: Path) -> Iterator[None]:
    """Have a directory of the machine to mount something over, made if there is none.

    The last sandbox removes one that was made: before, it would take the mounts of the
    others with it. One that the machine had stays, if it is empty, too.
    """
    with contextlib.ExitStack() as undo:
        there = False
        while not there:
            undo.close()
            place.mkdir(_MADE_HERE, exist_ok=True)
            # meanwhile the last of others may have removed it
            with contextlib.suppress(FileNotFoundError):
                directory = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
                undo.callback(os.close, directory)
                fcntl.flock(directory, fcntl.LOCK_SH)
                there = os.path.samestat(place.stat(), os.fstat(directory))
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(directory).st_mode & stat.S_ISVTX:
                    place.rmdir()


def _have_units(directory: Path) -> None:
    """Have the units of a core where systemd has all; not where there is no systemd."""
    WANTED_UNITS.mkdir(parents=True, exist_ok=True)
    for unit in directory.glob("*.service") if UNITS.is_dir() else ():
        (UNITS / unit.name).unlink(missing_ok=True)
        shutil.copyfile(unit, UNITS / unit.name)


def _have_services(checkout: Path, policy: Mapping[str, Path]) -> None:
    """Have the policy of calls, and the one service that is a program of the core."""
    for place in _POLICIES.values():
        place.mkdir(parents=True, exist_ok=True)
    default = checkout / "qubes-rpc-policy" / Path(_POLICY).name
    for name, file in {_POLICY: default, **policy}.items():
        kind, _, below = name.partition("/")
        target = _POLICIES[kind] / below
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.is_file():
            shutil.copyfile(file, target)
    # for volumes that are sent as a whole: the client runs this program itself
    source = checkout / "qubes-rpc" / _IMPORT
    for name in (_IMPORT, f"{_IMPORT}WithSize"):
        service = Path("/etc/qubes-rpc", name)
        service.unlink(missing_ok=True)
        service.symlink_to(source)


def _have_programs(checkout: Path) -> None:
    """Have programs that are called by their paths: a core's, and ours."""
    ours = Path(__file__).with_name("bin")
    tools = [p for p in (checkout / _AUX_TOOLS).glob("*") if p.name != "Makefile"]
    for place, names in _OURS.items():
        below = place / "qubes"
        core = [*tools, checkout / "tests"] if place == _LIB else []
        if below.is_symlink():
            below.unlink()  # to a directory of the machine
        for program in [*core, *map(ours.joinpath, names)] if place.is_dir() else ():
            below.mkdir(exist_ok=True)
            (below / program.name).unlink(missing_ok=True)
            (below / program.name).symlink_to(program)


def _have_user() -> None:
    """Have a user of dom0, at home in a place that is the sandbox's.

    It has root's number: programs that a core starts as this user are those of the run,
    which may lie where nobody else looks, and what they make has to be removed with it.
    The line of root comes first, so root is still who the number means.
    """
    users = Path("/etc/passwd")
    text = users.read_text(**_AS_IT_IS)
    lines = [line.split(":") for line in text.splitlines()]
    for fields in lines:
        if fields[0] == "root":
            fields[5] = os.fspath(HOME)
    others = [":".join(fields) for fields in lines if fields[0] != _USER]
    user = f"{_USER}:*:0:0:the user of dom0:{HOME}:/bin/sh"
    users.unlink()
    users.write_text("\n".join([*others, user, ""]), **_AS_IT_IS)
    users.chmod(0o644)


def _have_group() -> None:
    """Have the group that may use the core, with the user of dom0 in it."""
    groups = Path("/etc/group")
    text = groups.read_text(**_AS_IT_IS)
    others = [line for line in text.splitlines() if not line.startswith(f"{_GROUP}:")]
    taken = {group.gr_gid for group in grp.getgrall()}
    number = next(n for n in range(98, 1000) if n not in taken)
    groups.unlink()
    lines = [*others, f"{_GROUP}:x:{number}:{_USER}", ""]
    groups.write_text("\n".join(lines), **_AS_IT_IS)
    groups.chmod(0o644)
