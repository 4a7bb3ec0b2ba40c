"""The processes of a sandbox: who waits outside, who keeps it, and PID 1 inside.

A separate program (``sandbox_init.py MARK [--outer-network] COMMAND…``), the option
for `sandbox.enter_outer_network`, that uses the standard
library alone, and little of that, so that it starts at once. The outer process waits
and passes signals on. Its child, the keeper, makes the mount and the PID namespace;
PID 1 sets up the others, starts the command and reaps orphans until the command ends.
When the outer process dies, the keeper kills PID 1. It is in no process group that is
killed with others, and frees last what no namespace frees.

Why not unshare(1): up to util-linux 2.40 it blocks SIGINT and SIGTERM while it
waits, and passes none on.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import signal
import stat
import struct
import sys
import termios

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

INTERNAL_ERROR = 3
NO_SANDBOX = 13
NOT_FOUND = 127

# linux/: sched.h, mount.h, prctl.h, sockios.h, if.h, loop.h, limits.h
CLONE_NEWNS = 0x00020000
CLONE_NEWIPC = 0x08000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
MNT_DETACH = 2
PR_SET_PDEATHSIG = 1
SIOCGIFFLAGS, SIOCSIFFLAGS = 0x8913, 0x8914
LOOP_CLR_FD = 0x4C01
PATH_MAX = 4096
IFF_UP = 1
AF_UNIX, SOCK_DGRAM = 1, 2
SI_KERNEL = 0x80

FORWARDED = {
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
}

#: Comes to the keeper when the outer process has died.
ORPHANED = signal.SIGALRM

#: Where services of dom0 are.
SERVICES = "/etc/qubes-rpc"
#: What udev knows of devices.
DEVICES = "/run/udev/data"

#: The variable with the descriptor of the network namespace outside.
OUTER_NETWORK = "QUBES_ITESTS_OUTER_NETWORK"

#: The variable with the descriptor of the file for `sandbox.last_words`.
LAST_WORDS = "QUBES_ITESTS_LAST_WORDS"

#: libvirt's QEMU driver looks these up when it opens, and uses them for nothing.
USER = "libvirt-qemu"
GROUPS = {"libvirt-qemu": 64055, "kvm": 64056}

#: As in command.py, where programs outside are looked for.
SYSTEM_DIRECTORIES = ("/usr/local/sbin", "/usr/sbin", "/sbin")

libc = ctypes.CDLL(None, use_errno=True)


def main(mark: str, command: list[str]) -> NoReturn:
    """Run a command in new namespaces and exit with its status."""
    # Who ignores SIGCHLD is not told of any child's end.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Blocked before the fork: one that comes before `supervise` waits would end this
    # process by its default, and the command with it, without passing it on.
    waited_for = FORWARDED | {signal.SIGCHLD}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, waited_for)
    modes = terminal_modes()
    words = os.memfd_create("last words", 0)
    os.environ[LAST_WORDS] = str(words)
    alive, outer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(outer)
        signal.pthread_sigmask(signal.SIG_BLOCK, {ORPHANED})
        follow_parent(alive, ORPHANED)
        keep(mark, command, mask)
    os.close(alive)
    status = supervise(child)
    # What is killed while it has a terminal in another mode cannot put that right.
    if modes is not None and modes != terminal_modes() and in_foreground():
        termios.tcsetattr(0, termios.TCSANOW, modes)
    if said := os.pread(words, PATH_MAX, 0).rstrip(b"\0").decode(errors="replace"):
        # Whatever its status is: 0 would say that all went well.
        fail(f"exit status {status} {said}", INTERNAL_ERROR)
    sys.exit(status)


def terminal_modes() -> list[Any] | None:
    """Return the modes of the terminal that is the input, if one is."""
    try:
        return termios.tcgetattr(0)
    except termios.error:
        return None


def in_foreground() -> bool:
    """Return whether the terminal is ours to change: else that would stop us."""
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False


def follow_parent(alive: int, number: signal.Signals) -> None:
    """Get a signal when the parent dies; end here if it died just now."""
    # That tells of a death to come. If it has come already, the only other end of the
    # pipe is closed.
    check(libc.prctl(PR_SET_PDEATHSIG, number), "follow the parent's death")
    if select.select([alive], [], [], 0)[0]:
        os._exit(NO_SANDBOX)
    os.close(alive)


def keep(mark: str, command: list[str], mask: set[int | signal.Signals]) -> NoReturn:
    """Be the keeper: stay in the mount namespace until all in there have ended."""
    # The next child is PID 1; this process stays in the PID namespace that it is in.
    check(libc.unshare(CLONE_NEWNS | CLONE_NEWPID), "make a PID namespace")
    alive, keeper = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(keeper)
        follow_parent(alive, signal.SIGKILL)
        run_init(mark, command, mask)
    os.close(alive)
    # After the fork: the command stays with the terminal, and in the group of the outer
    # process. SIGKILL to that group does not come here.
    os.setsid()
    status = supervise(child, frozenset({ORPHANED}))
    detach_loop_devices()
    os._exit(status)


def detach_loop_devices() -> None:
    """Detach loop devices over files that were opened by mounts of this namespace.

    Those of mounts go with these, but what losetup(8) attaches stays until somebody
    detaches it, and so does the filesystem that the file is on.
    """
    for name in os.listdir("/sys/block"):
        try:
            shown = os.open(f"/sys/block/{name}/loop/backing_file", os.O_RDONLY)
        except FileNotFoundError:
            continue  # it is none, or nothing is attached to it
        try:
            if opened_here(shown):
                device = os.open(f"/dev/{name}", os.O_RDONLY)
                fcntl.ioctl(device, LOOP_CLR_FD)
                os.close(device)
        except OSError:
            pass  # it has gone meanwhile
        os.close(shown)


def opened_here(shown: int) -> bool:
    """Return whether a mount of this namespace is the one that a file was opened by.

    No two namespaces have a mount in common. The kernel shows a path from the root of
    the reader on if the mount is one below that: the path is then another one for who
    has another root.
    """
    path = os.pread(shown, PATH_MAX, 0)
    root = os.open("/", os.O_PATH)
    try:
        os.chroot(b"/" + path.split(b"/")[1])
        there = os.pread(shown, PATH_MAX, 0)
    finally:
        os.fchdir(root)
        os.chroot(".")
        os.close(root)
    return there != path


def run_init(
    mark: str, command: list[str], mask: set[int | signal.Signals]
) -> NoReturn:
    """Be PID 1: set the namespaces up, start the command, reap."""
    os.environ.pop(OUTER_NETWORK, None)
    outer = None
    if command[0] == "--outer-network":
        outer, command = os.open("/proc/self/ns/net", os.O_RDONLY), command[1:]
    check(libc.unshare(CLONE_NEWNET | CLONE_NEWIPC), "make namespaces")
    set_up()
    # The command is not PID 1 itself: that has to reap orphans, and the kernel spares
    # it the signals that it has no handler for, Ctrl-C and abort() among them.
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.environ[mark] = identity()
        if outer is not None:
            os.set_inheritable(outer, True)
            os.environ[OUTER_NETWORK] = str(outer)
        execute(command)
    if outer is not None:
        os.close(outer)
    os._exit(supervise(child))


def supervise(child: int, lost: frozenset[signal.Signals] = frozenset()) -> int:
    """Pass signals on and reap until a child ends; return its exit status.

    The terminal signals the whole process group by itself (SI_KERNEL): what comes
    from there has reached the command already and is not passed on.

    :param lost: signals at which the child is killed.
    """
    while True:
        received = signal.sigwaitinfo(FORWARDED | {signal.SIGCHLD} | lost)
        if received.si_signo == signal.SIGCHLD:
            status = reap(child)
            if status is not None:
                return status
        elif received.si_signo in lost:
            os.kill(child, signal.SIGKILL)
        elif received.si_code != SI_KERNEL:
            os.kill(child, received.si_signo)


def reap(child: int) -> int | None:
    """Reap everything that has ended; return the child's status if it has."""
    ended = None
    # all of them: signals of one kind that come while one waits are one signal
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            ended = code if code >= 0 else 128 - code


def execute(command: list[str]) -> NoReturn:
    """Become the command."""
    try:
        os.execvp(command[0], command)  # noqa: S606
    except OSError as error:
        fail(f"{command[0]}: {error.strerror}", NOT_FOUND)


def set_up() -> None:
    """Make the fresh namespaces usable."""
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    # shared memory belongs to the IPC namespace; rundir has its short names in it, and
    # loop.py the nodes of devices that a container's /dev has not
    mount("none", "/dev/shm", "tmpfs", MS_NOSUID)
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    have_services()
    have_run()
    add_libvirt_user()
    raise_loopback()
    if not os.path.isdir(os.environ.get("TMPDIR", "/tmp")):
        del os.environ["TMPDIR"]
    # Programs of the system are found whatever the PATH of a user has, as outside.
    path = os.environ.get("PATH") or os.defpath
    more = [name for name in SYSTEM_DIRECTORIES if name not in path.split(":")]
    os.environ["PATH"] = ":".join([path, *more])
    # Sessions of the user outside are none of the run's business.
    for name in ("DBUS_SESSION_BUS_ADDRESS", "XDG_RUNTIME_DIR"):
        os.environ.pop(name, None)


def have_services() -> None:
    """Have an empty folder for services of dom0 in here, whatever the machine has.

    A Qubes VM has its own services there, which are not the run's. Where there is no
    such folder, /etc is overlaid, and what is written to it ends with the sandbox; a
    system that cannot do that, for its /etc is an overlay of overlays, goes without.
    """
    if not os.path.isdir(SERVICES):
        layer = "/tmp/layer"
        mounted = mounts_below("/etc")
        mount("none", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV)
        for name in (f"{layer}/qubes-rpc", "/tmp/work"):
            os.makedirs(name)
        os.chmod(layer, 0o755)
        options = f"lowerdir=/etc,upperdir={layer},workdir=/tmp/work"
        arguments = b"overlay", b"/etc", b"overlay", ctypes.c_ulong(0), options.encode()
        result = libc.mount(*arguments)
        check(libc.umount2(b"/tmp", MNT_DETACH), "unmount /tmp")
        for path, descriptor in mounted:
            if result == 0:
                mount(f"/proc/self/fd/{descriptor}", path, None, MS_BIND)
            os.close(descriptor)
    if os.path.isdir(SERVICES):
        mount("none", SERVICES, "tmpfs", MS_NOSUID | MS_NODEV)
        os.chmod(SERVICES, 0o755)


def have_run() -> None:
    """Have a /run in here: what the machine has in its own, and what dom0 has besides.

    A run has the sockets of dom0 for itself: those of a Qubes system, or of a run that
    this one is within, are not seen. Where no udev runs, it knows of no device: there
    is an empty database, for who looks up what is in it.
    """
    found = []
    for entry in os.scandir("/run"):
        if entry.name.startswith("qubesd."):
            continue
        try:
            descriptor = os.open(entry.path, os.O_PATH | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue  # it is gone meanwhile
        found.append((entry.path, descriptor))
    mount("none", "/run", "tmpfs", MS_NOSUID | MS_NODEV)
    os.chmod("/run", 0o755)
    for path, descriptor in found:
        show(descriptor, path)
        os.close(descriptor)
    if not os.path.isdir("/run/udev"):
        os.makedirs(DEVICES)


def show(descriptor: int, path: str) -> None:
    """Have what was opened without a mode at a path where nothing is."""
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISLNK(mode):
        os.symlink(os.readlink("", dir_fd=descriptor), path)
        return
    if stat.S_ISDIR(mode):
        os.mkdir(path)
    else:
        os.close(os.open(path, os.O_CREAT))
    source = f"/proc/self/fd/{descriptor}".encode()
    flags = ctypes.c_ulong(MS_BIND | MS_REC)
    result = libc.mount(source, path.encode(), None, flags, None)
    if os.fstat(descriptor).st_nlink > 0:  # else it is gone meanwhile
        check(result, f"mount {path}")


def mounts_below(place: str) -> list[tuple[str, int]]:
    """Return where something is mounted below a folder, and a descriptor of it."""
    lines = read("/proc/self/mountinfo").splitlines()
    paths = [unescaped(line.split(" ")[4]) for line in lines]
    found = [path for path in paths if path.startswith(f"{place}/")]
    return [(path, os.open(path, os.O_PATH)) for path in dict.fromkeys(found)]


def unescaped(path: str) -> str:
    """Return a path as mountinfo has it: blanks and backslashes are octal there."""
    for character in " \t\n\\":
        path = path.replace(f"\\{ord(character):03o}", character)
    return path


def add_libvirt_user() -> None:
    """Show libvirt's user and groups, where the machine has none, in here only."""
    groups = read("/etc/group")
    lines = [
        f"{name}:x:{number}:"
        for name, number in GROUPS.items()
        if f"\n{name}:" not in f"\n{groups}"
    ]
    show_with_lines("/etc/group", groups, lines)
    users = read("/etc/passwd")
    if f"\n{USER}:" not in f"\n{users}":
        number = GROUPS[USER]
        line = f"{USER}:x:{number}:{number}::/var/lib/libvirt:/usr/sbin/nologin"
        show_with_lines("/etc/passwd", users, [line])


def read(path: str) -> str:
    """Return a file's text."""
    with open(path, "rb") as file:  # pathlib takes long to import
        return file.read().decode(errors="surrogateescape")


def show_with_lines(path: str, text: str, lines: list[str]) -> None:
    """Mount a copy of a file with more lines over it.

    The copy lies on a file system that is gone from sight before anybody looks, and
    from memory with the sandbox: nothing to clean up after a kill.
    """
    if not lines:
        return
    copy = "/tmp/copy"
    mount("none", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV)
    data = "\n".join([text.rstrip("\n"), *lines, ""])
    with open(copy, "wb") as file:
        file.write(data.encode(errors="surrogateescape"))
        os.fchmod(file.fileno(), 0o644)
    mount(copy, path, None, MS_BIND)
    check(libc.umount2(b"/tmp", 0), "unmount /tmp")


def raise_loopback() -> None:
    """Set the loopback interface up."""
    any_socket = libc.socket(AF_UNIX, SOCK_DGRAM, 0)
    request = struct.pack("16sH22x", b"lo", 0)
    flags = struct.unpack_from("H", fcntl.ioctl(any_socket, SIOCGIFFLAGS, request), 16)
    request = struct.pack("16sH22x", b"lo", flags[0] | IFF_UP)
    fcntl.ioctl(any_socket, SIOCSIFFLAGS, request)
    os.close(any_socket)


def identity() -> str:
    """Return what tells these namespaces from all others."""
    return ",".join(
        f"{name}:{os.stat(f'/proc/self/ns/{name}').st_ino}"
        for name in ("mnt", "pid", "net", "ipc")
    )


def mount(source: str, target: str, kind: str | None, flags: int) -> None:
    """Mount, or say why not and exit."""
    result = libc.mount(
        source.encode(),
        target.encode(),
        kind and kind.encode(),
        ctypes.c_ulong(flags),
        None,
    )
    check(result, f"mount {target}")


def check(result: int, act: str) -> None:
    """Exit with one sentence if a system call failed."""
    if result == 0:
        return
    reason = os.strerror(ctypes.get_errno())
    fail(
        f"the sandbox could not {act}: {reason}. A container needs CAP_SYS_ADMIN"
        " and an unmasked /proc (docker run --privileged).",
        NO_SANDBOX,
    )


def fail(sentence: str, status: int) -> NoReturn:
    """Say why and exit, past every handler: this process may be a fork."""
    sys.stderr.write(f"qubes_itests: {sentence}\n")
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
