"""The root filesystem of the mini template, as a directory."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from qubes_itests.guest.exc import ImageError
from qubes_itests.host.command import CommandError, run
from qubes_itests.host.packages import find_program
from qubes_itests.program import typed

__all__ = [
    "AGENT_LINKS",
    "SHARED",
    "TOOLS",
    "fill_rootfs",
    "find_tool",
    "make_directory",
    "write_file",
]

#: Programs of the host that the guest gets besides busybox, with their libraries.
TOOLS: Final = ("bash", "mke2fs", "resize2fs", "e2fsck")

_LIBRARY: Final = re.compile(r"^\s*(?:\S+ => )?(/\S+) \(0x[0-9a-f]+\)$", re.MULTILINE)
_UID: Final = 1000

_DIRECTORIES: Final = (
    *("dev", "etc/qubes-rpc", "etc/qubes/rpc-config", "home/user", "mnt", "proc"),
    *("root", "run", "rw", "sys", "tmp", "usr/bin", "usr/lib/qubes", "usr/lib64"),
    *("usr/local/bin", "usr/share", "var/cache", "var/lib", "var/log", "var/tmp"),
)
#: Names under which guests find the agent's program.
AGENT_LINKS: Final = {
    "usr/bin/qrexec-client-vm": "../lib/qubes/agent",
    **dict.fromkeys(
        (
            f"usr/bin/qubesdb-{command}"
            for command in ("read", "list", "multiread", "write", "rm", "watch")
        ),
        "../lib/qubes/agent",
    ),
    "usr/lib/qubes/qrexec-client-vm": "agent",
}
_LINKS: Final = {
    **AGENT_LINKS,
    "bin": "usr/bin",
    "lib": "usr/lib",
    "lib64": "usr/lib64",
    "sbin": "usr/bin",
    "usr/sbin": "bin",
    "var/run": "../run",
    "usr/bin/mkfs.ext4": "mke2fs",
    "usr/bin/fsck.ext4": "e2fsck",
    "usr/bin/init": "../lib/qubes/agent",
    "etc/mtab": "../proc/mounts",
}
_PROFILE: Final = (
    "umask 022\nexport LANG=C.UTF-8\n"
    "for file in /etc/profile.d/*.sh; do\n"
    '    [ ! -r "$file" ] || . "$file"\ndone\nunset file\n'
)
_FILES: Final = {
    "etc/passwd": (
        "root:x:0:0:root:/root:/bin/sh\n"
        "user:x:1000:1000:user:/home/user:/bin/sh\n"
        "nobody:x:65534:65534:nobody:/:/bin/false\n"
    ),
    "etc/group": (
        "root:x:0:\ntty:x:5:\ndisk:x:6:\nqubes:x:98:user\nuser:x:1000:\n"
        "nogroup:x:65534:\n"
    ),
    "etc/shadow": "root:*:1:0:99999:7:::\nuser:*:1:0:99999:7:::\n",
    "etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "etc/shells": "/bin/sh\n/bin/bash\n",
    "etc/os-release": (
        'ID=tiny\nNAME="tiny"\nPRETTY_NAME="tiny, the mini template of qubes_itests"\n'
    ),
    "etc/profile": _PROFILE,
    # What it does the agent does itself, without a shell, while the two are the same.
    "usr/lib/qubes/profile": _PROFILE,
    "etc/qubes/rpc-config/qubes.VMRootExec": "force-user=root\n",
    "etc/qubes/rpc-config/qubes.VMRootShell": "force-user=root\n",
}
_SCRIPTS: Final = {
    # Not busybox: it reads ahead, and takes from a command what that is to read.
    "etc/qubes-rpc/qubes.VMShell": "exec /bin/bash\n",
    "etc/qubes-rpc/qubes.VMRootShell": "exec /bin/bash\n",
    "etc/qubes-rpc/qubes.VMRootExec": 'exec /etc/qubes-rpc/qubes.VMExec "$@"\n',
    "etc/qubes-rpc/qubes.WaitForRunningSystem": "# nothing starts by itself\n",
    "etc/qubes-rpc/qubes.WaitForSession": "# there is no session to wait for\n",
    # The kernel learns of a new size in its own time; here it is asked for it. Without
    # that a filesystem would have its size already, and nothing be done.
    "etc/qubes-rpc/qubes.ResizeDisk": (
        "set -e\n"
        # core-admin sends no end of line, for which `read` fails
        'read -r volume || [ -n "$volume" ]\n'
        "case $volume in\n"
        "    root) device=/dev/xvda ;;\n"
        "    private) device=/dev/xvdb ;;\n"
        '    *) echo "volume $volume has no filesystem" >&2; exit 1 ;;\n'
        "esac\n"
        'disk=$(basename "$(readlink -f $device)")\n'
        'echo 1 > "/sys/class/block/$disk/device/rescan"\n'
        "exec resize2fs $device >&2\n"
    ),
    "etc/qubes-rpc/qubes.GetDate": "exec date -u -Iseconds\n",
    # The argument is a command line: words with + between them, where -- stands for
    # a - and -XX for the byte of that hexadecimal value.
    "etc/qubes-rpc/qubes.VMExec": (
        "rest=$1+\nset --\n"
        'while [ -n "$rest" ]; do\n'
        "    word=$(printf '%s' \"${rest%%+*}\" |"
        " sed 's/--/\\\\0055/g; s/-\\([0-9A-F][0-9A-F]\\)/\\\\x\\1/g')\n"
        "    word=$(printf '%b.' \"$word\")\n"
        '    set -- "$@" "${word%.}"\n'
        "    rest=${rest#*+}\n"
        'done\nexec "$@"\n'
    ),
}
_DEBIAN: Final = Path(__file__).parent / "debian" / "root"
#: Programs that guests of Debian have as well.
SHARED: Final = tuple(
    _DEBIAN / name
    for name in (
        "etc/qubes-rpc/qubes.PostInstall",
        "etc/qubes/post-install.d/10-services.sh",
        "etc/qubes/post-install.d/90-qubes.sh",
        "usr/bin/qvm-features-request",
    )
)
#: Applets that the agent or a script above takes the place of.
_NOT_APPLETS: Final = frozenset({"busybox", "init", "linuxrc", "sulogin"})


def find_tool(name: str) -> Path:
    """Return the path of a program of the host.

    :raise ImageError: it is not installed.
    """
    found = find_program(name)
    if found is None:
        raise ImageError(
            "root image",
            f"{name} is not installed; see: {typed('doctor')}",
        )
    return found


def make_directory(path: Path) -> None:
    """Make a directory of a guest that all may enter, and those above that are missing.

    The umask has no say: what the caller's is must not be seen in images.
    """
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir()
        path.chmod(0o755)


def write_file(path: Path, data: bytes, mode: int) -> None:
    """Write a file of a guest, in a directory that is made if it is missing.

    :param mode: its permissions, whatever the umask.
    """
    make_directory(path.parent)
    path.write_bytes(data)
    path.chmod(mode)


def fill_rootfs(directory: Path, agent: Path) -> None:
    """Put everything that the mini template has into an empty directory. Blocking.

    :param directory: owned by the caller, who must be root.
    :param agent: the guest's program.
    :raise ImageError: a program that goes in is not installed.
    """
    for name in _DIRECTORIES:
        make_directory(directory / name)
    for name, target in _LINKS.items():
        (directory / name).symlink_to(target)
    for name, text in _FILES.items():
        write_file(directory / name, text.encode(), 0o644)
    for name, text in _SCRIPTS.items():
        write_file(directory / name, b"#!/bin/sh\n" + text.encode(), 0o755)
    for path in SHARED:
        place = path.relative_to(_DEBIAN)
        write_file(directory / place, path.read_bytes(), 0o755)
    write_file(directory / "usr/lib/qubes/agent", agent.read_bytes(), 0o755)
    for name in ("busybox", *TOOLS):
        _copy_program(find_tool(name), directory)
    _link_applets(directory / "usr/bin", find_tool("busybox"))
    _set_permissions(directory)


def _copy_program(program: Path, directory: Path) -> None:
    write_file(directory / "usr/bin" / program.name, program.read_bytes(), 0o755)
    for library in _libraries(program):
        place = directory / str(library).lstrip("/")
        if not place.exists():
            write_file(place, library.read_bytes(), 0o755)


def _libraries(program: Path) -> list[Path]:
    try:
        return [Path(p) for p in _LIBRARY.findall(run(["ldd", program]))]
    except CommandError:
        return []  # statically linked


def _link_applets(binaries: Path, busybox: Path) -> None:
    for applet in run([busybox, "--list"]).split():
        place = binaries / applet
        if applet not in _NOT_APPLETS and not place.is_symlink() | place.exists():
            place.symlink_to("busybox")


def _set_permissions(directory: Path) -> None:
    for name in ("tmp", "var/tmp"):
        (directory / name).chmod(0o1777)
    (directory / "root").chmod(0o700)
    (directory / "etc/shadow").chmod(0o600)
    os.chown(directory / "home/user", _UID, _UID)
    (directory / "home/user").chmod(0o700)
