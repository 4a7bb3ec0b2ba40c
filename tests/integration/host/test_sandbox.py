"""The sandbox: what it separates, what it passes on, and that nothing survives it.

The tests may themselves run in a sandbox: sandboxes nest when asked for by command.
"""

import contextlib
import fcntl
import os
import pty
import random
import resource
import select
import shlex
import signal
import statistics
import subprocess
import sys
import termios
import textwrap
import time
from pathlib import Path

import pytest

from qubes_itests.exc import EnvironmentNotReadyError
from qubes_itests.host import sandbox
from qubes_itests.host.loop import loop_devices_over

_NOBODY = 65534
_HOSTS = "print(open('/etc/hosts').read())"
_WAIT = 300.0


def _inside(code: str, *arguments: object) -> list[str]:
    """Return the command line that runs Python code in a new sandbox."""
    words = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return sandbox.command(words)


def _run(argv: list[str], **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        argv, capture_output=True, text=True, timeout=300, check=False, **options
    )


def _python(code: str, **options) -> subprocess.CompletedProcess:
    """Run Python code in a process that is in no sandbox of ours."""
    environment = {**os.environ, **options.pop("env", {})}
    if "QUBES_ITESTS_SANDBOX" not in options:
        environment.pop("QUBES_ITESTS_SANDBOX", None)
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return _run(command, env=environment, **options)


def _wait_for(condition, what: str) -> None:
    deadline = time.monotonic() + _WAIT
    while not condition():
        assert time.monotonic() < deadline, f"no {what}"
        select.select([], [], [], 0.01)


def test_services_of_dom0_are_its_own():
    """The folder is there and empty, in a sandbox within as well; nothing is left."""
    code = """
    import os
    from pathlib import Path
    place = Path("/etc/qubes-rpc")
    print(os.listdir(place), oct(place.stat().st_mode & 0o777))
    place.joinpath("t.Service").touch()
    """
    there = os.path.lexists("/etc/qubes-rpc/t.Service")
    done = _run(_inside(code))
    assert done.stdout == "[] 0o755\n", done.stderr
    assert os.path.lexists("/etc/qubes-rpc/t.Service") == there
    nested = sandbox.command(_inside(code))
    assert _run(nested).stdout == "[] 0o755\n"


def test_what_is_put_into_run_ends_with_the_sandbox():
    """What the machine has there is there: files, sockets, links, and mounts.

    But for sockets of a dom0, as of a run that this one is within: it has its own.
    """
    outside = """
        import os, socket, subprocess, sys
        from pathlib import Path
        subprocess.run(["mount", "-t", "tmpfs", "none", "/run"], check=True)
        os.mkdir("/run/mount")  # which mount(8) makes
        os.makedirs("/run/folder/below")
        subprocess.run(["mount", "-t", "tmpfs", "none", "/run/folder/below"])
        Path("/run/folder/below/file").touch()
        os.symlink("folder", "/run/link")
        Path("/run/qubesd.sock").touch()
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("/run/socket")
            server.listen()
            subprocess.run(sys.argv[1:], check=True)
        print(*sorted(os.listdir("/run")))
    """
    inside = """
        import os, socket
        from pathlib import Path
        print(*sorted(os.listdir("/run")), os.listdir("/run/udev/data"))
        print(os.readlink("/run/link"), os.listdir("/run/link/below"), flush=True)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect("/run/socket")
        Path("/run/new").touch()
    """
    command = ["unshare", "--mount", sys.executable, "-c", textwrap.dedent(outside)]
    done = _run([*command, *_inside(inside)])
    assert done.stdout.splitlines() == [
        "folder link mount socket udev []",
        "folder ['file']",
        "folder link mount qubesd.sock socket",
    ], done.stderr


def test_what_udev_knows_of_devices_is_seen():
    outside = "mount -t tmpfs none /run; mkdir -p /run/udev/data; >/run/udev/data/b7:0;"
    inside = shlex.join(_inside("import os; print(os.listdir('/run/udev/data'))"))
    done = _run(["unshare", "--mount", "sh", "-c", f"{outside} exec {inside}"])
    assert done.stdout == "['b7:0']\n", done.stderr


def test_what_is_mounted_in_etc_stays_there(tmp_path):
    """As containers have their resolv.conf, whatever way the folder is made."""
    mounted = tmp_path / "mounted"
    mounted.write_text("what a container has mounted")
    script = f"mount --bind {mounted} /etc/hosts; exec {shlex.join(_inside(_HOSTS))}"
    done = _run(["unshare", "--mount", "sh", "-c", script])
    assert done.stdout == "what a container has mounted\n", done.stderr


def test_namespaces_are_its_own():
    code = "import os; print(*(os.readlink('/proc/self/ns/' + n) for n in {names}))"
    names = ("mnt", "pid", "net", "ipc")
    inside = _run(_inside(code.format(names=names))).stdout.split()
    outside = [os.readlink(f"/proc/self/ns/{name}") for name in names]  # noqa: PTH115
    assert len(inside) == 4
    assert not set(inside) & set(outside)


def test_proc_shows_the_processes_inside_only():
    code = "import os; print(*sorted(n for n in os.listdir('/proc') if n.isdigit()))"
    assert _run(_inside(code)).stdout == "1 2\n"


def test_directory_environment_and_streams_pass_through(tmp_path):
    code = """
        import os, sys
        sys.stdout.write(os.getcwd() + os.environ["GREETING"] + sys.stdin.read())
        sys.stderr.write("error")
    """
    environment = {**os.environ, "GREETING": " hello "}
    done = _run(_inside(code), cwd=tmp_path, env=environment, input="input")
    assert done.stdout == f"{tmp_path} hello input"
    assert done.stderr == "error"


@pytest.mark.parametrize("status", [0, 1, 13, 255])
def test_the_exit_status_passes_through(status):
    assert _run(sandbox.command(["sh", "-c", f"exit {status}"])).returncode == status


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_death_by_a_signal_shows_in_the_exit_status(number):
    done = _run(sandbox.command(["sh", "-c", f"kill -{number.value} $$"]))
    assert done.returncode == 128 + number


def test_a_command_that_is_not_there_is_said_so():
    done = _run(sandbox.command(["/no/such/program"]))
    assert done.returncode == 127
    assert done.stderr == "qubes_itests: /no/such/program: No such file or directory\n"


def test_orphans_are_reaped():
    """PID 1 takes them in: soon after they end, none is left as a zombie."""
    code = """
        import os, select, sys
        for _ in range(20):
            if os.fork() == 0:
                if os.fork() == 0:
                    os._exit(0)
                os._exit(0)
            os.wait()
        for _ in range(30_000):
            if sorted(n for n in os.listdir("/proc") if n.isdigit()) == ["1", "2"]:
                sys.exit(0)
            select.select([], [], [], 0.01)
        sys.exit("zombies are left")
    """
    done = _run(_inside(code))
    assert (done.returncode, done.stderr) == (0, "")


def test_a_parent_that_ignores_sigchld_does_not_confuse_it():
    done = _run(
        sandbox.command(["sh", "-c", "true; exit 5"]),
        preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN),
    )
    assert done.returncode == 5


def test_daemons_end_with_the_command(tmp_path):
    token = f"{tmp_path}/daemon"
    code = """
        import subprocess, sys
        sleep = ["sleep", "600"]
        subprocess.Popen(["sh", "-c", "sleep 600; : " + sys.argv[1]],
                         start_new_session=True)
    """
    assert _run(_inside(code, token)).returncode == 0
    assert _processes_with(token) == []


def test_the_loopback_interface_is_up_and_the_only_one():
    code = """
        import socket
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname()).close()
        print(socket.if_nameindex())
    """
    assert _run(_inside(code)).stdout == "[(1, 'lo')]\n"


def test_mounts_stay_inside(tmp_path):
    script = f"mount -t tmpfs none {tmp_path} && touch {tmp_path}/x && ls {tmp_path}"
    done = _run(sandbox.command(["sh", "-c", script]))
    assert done.stdout == "x\n"
    assert list(tmp_path.iterdir()) == []


def test_libvirts_user_is_there_without_touching_the_machine():
    users, groups = Path("/etc/passwd"), Path("/etc/group")
    before = users.read_bytes(), groups.read_bytes(), users.stat(), groups.stat()
    code = """
        import grp, os, pwd
        print(pwd.getpwnam("libvirt-qemu").pw_name, grp.getgrnam("kvm").gr_name)
        print(pwd.getpwuid(0).pw_name, os.path.ismount("/tmp"))
    """
    outside = os.path.ismount("/tmp")  # noqa: S108
    done = _run(_inside(code))
    assert done.stdout == f"libvirt-qemu kvm\nroot {outside}\n"
    after = users.read_bytes(), groups.read_bytes(), users.stat(), groups.stat()
    assert [a.st_ino for a in after[2:]] == [b.st_ino for b in before[2:]]
    assert after[:2] == before[:2]


def test_the_users_session_is_out_of_reach(tmp_path):
    environment = {
        **os.environ,
        "DBUS_SESSION_BUS_ADDRESS": "unix:path=/x",
        "XDG_RUNTIME_DIR": "/run/user/0",
        "TMPDIR": str(tmp_path / "gone"),
    }
    code = "import os, tempfile; print(sorted(os.environ), tempfile.gettempdir())"
    done = _run(_inside(code), env=environment)
    for name in ("DBUS_SESSION_BUS_ADDRESS", "XDG_RUNTIME_DIR", "TMPDIR"):
        assert repr(name) not in done.stdout
    assert done.returncode == 0


_REEXEC = """
    import os, sys
    from qubes_itests.host import sandbox
    print("before", sandbox.active(), flush=True)
    sandbox.reexec()
    mark = os.environ["QUBES_ITESTS_SANDBOX"]
    sandbox.reexec()
    sandbox.require()
    print("inside", sandbox.active(), os.getpid(), mark)
"""


def test_reexec_starts_the_process_over_inside_and_only_once():
    lines = _python(_REEXEC).stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["before", "False"],
        ["before", "True"],
        ["inside", "True"],
    ]
    assert lines[-1].split()[2] == "2"


def test_a_mark_that_leaked_elsewhere_does_not_count():
    """Neither outside, nor in namespaces that something inside has made."""
    mark = _python(_REEXEC).stdout.split()[-1]
    code = "from qubes_itests.host import sandbox; print(sandbox.active())"
    leaked = {**os.environ, "QUBES_ITESTS_SANDBOX": mark}
    assert _run([sys.executable, "-c", code], env=leaked).stdout == "False\n"
    inner = ["unshare", "--net", sys.executable, "-c", code]
    assert _run(sandbox.command(inner)).stdout == "False\n"


def test_outside_require_says_how_to_get_in(monkeypatch):
    monkeypatch.delenv("QUBES_ITESTS_SANDBOX", raising=False)
    with pytest.raises(
        EnvironmentNotReadyError, match=r"Run it by .*itests, or by pytest -p"
    ) as caught:
        sandbox.require()
    assert caught.value.exit_code == 13


def test_without_root_it_is_refused():
    code = """
        import os, sys
        os.setuid(65534)
        from qubes_itests.exc import EnvironmentNotReadyError
        from qubes_itests.host import sandbox
        try:
            sandbox.reexec()
        except EnvironmentNotReadyError as error:
            print(error)
            sys.exit(error.exit_code)
    """
    # Imports first: the files may not be readable for others.
    done = _python("import qubes_itests.host.sandbox\n" + textwrap.dedent(code))
    assert done.returncode == 10
    assert "sudo" in done.stdout


def test_where_the_system_refuses_one_sentence_says_so():
    """As root in a container that lacks the right to make namespaces."""
    lacking = ["setpriv", "--inh-caps=-sys_admin", "--bounding-set=-sys_admin"]
    done = _run([*lacking, *sandbox.command(["true"])])
    assert done.returncode == 13
    assert done.stderr.startswith("qubes_itests: the sandbox could not make a PID")
    assert "CAP_SYS_ADMIN" in done.stderr
    assert done.stderr.count("\n") == 1


_INTERRUPTED = """
    import select, signal, sys
    from qubes_itests.host import sandbox
    # The tests may run under nohup(1), whose children ignore this one.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    sandbox.reexec()
    try:
        print("ready", flush=True)
        signal.pause()
    except KeyboardInterrupt:
        # An echo of the same signal would break this, as it would a clean-up.
        select.select([], [], [], 0.3)
        print("orderly", flush=True)
        sys.exit(2)
"""


def _start(code: str, **options) -> subprocess.Popen:
    environment = {**os.environ}
    environment.pop("QUBES_ITESTS_SANDBOX", None)
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("whole_group", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_run_in_order(number, whole_group):
    """To the outer process alone, or to the whole group as timeout(1) sends it."""
    with _start(_INTERRUPTED, start_new_session=True) as process:
        (os.killpg if whole_group else os.kill)(process.pid, number)
        try:
            assert process.communicate(timeout=_WAIT)[0] == "orderly\n"
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert process.returncode == 2


def test_control_c_on_the_terminal_ends_the_run_in_order():
    master, terminal = pty.openpty()

    def take_terminal():
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    with _start(
        _INTERRUPTED, stdin=terminal, start_new_session=True, preexec_fn=take_terminal
    ) as process:
        os.close(terminal)
        os.write(master, b"\x03")
        assert process.communicate(timeout=_WAIT)[0] == "orderly\n"
    os.close(master)
    assert process.returncode == 2


def test_a_terminal_has_its_modes_again_when_what_changed_them_is_killed():
    master, terminal = pty.openpty()
    modes = termios.tcgetattr(terminal)

    def take_terminal():
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    with _start(
        """
        import os, signal, tty
        from qubes_itests.host import sandbox
        sandbox.reexec()
        tty.setraw(0)
        print("ready", flush=True)
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        stdin=terminal,
        start_new_session=True,
        preexec_fn=take_terminal,
    ) as process:
        assert termios.tcgetattr(terminal) != modes
        os.write(master, b"x")
        process.communicate(timeout=_WAIT)
    assert process.returncode == 128 + signal.SIGKILL
    assert termios.tcgetattr(terminal) == modes
    os.close(terminal)
    os.close(master)


def test_what_is_started_to_ignore_a_signal_ignores_it_alone():
    """As below nohup: the run goes on, and its children begin with the default."""
    with _start(
        """
        import os, signal, subprocess, sys
        if sys.argv[-1] != "ignoring":
            for number in (signal.SIGHUP, signal.SIGQUIT):
                signal.signal(number, signal.SIG_IGN)
            os.execv(sys.executable, [*sys.orig_argv, "ignoring"])
        from qubes_itests.host import sandbox
        sandbox.reexec()
        print("ready", flush=True)
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGQUIT)
        assert sandbox.ignored_signals() == [signal.SIGHUP, signal.SIGQUIT]
        child = "kill -HUP $$; echo it ignores the signal"
        sys.exit(-subprocess.run(["sh", "-c", child]).returncode)
        """
    ) as process:
        assert process.communicate(timeout=_WAIT)[0] == ""
    assert process.returncode == signal.SIGHUP


def test_signals_that_python_leaves_alone_reach_the_command():
    with _start("""
        import signal, sys
        from qubes_itests.host import sandbox
        sandbox.reexec()
        signal.signal(signal.SIGUSR1, lambda *_: sys.exit(7))
        print("ready", flush=True)
        signal.pause()
    """) as process:
        process.send_signal(signal.SIGUSR1)
        process.communicate(timeout=_WAIT)
    assert process.returncode == 7


@pytest.fixture
def image(tmp_path):
    """Make a small filesystem in a file."""
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(4 << 20)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", path], check=True, timeout=300)
    return path


#: Mounts the image by a loop device; attaches two more, over a file there and over one
#: that is lost; and leaves children about, one of them a daemon.
_LITTER = """
    mount -o loop {image} {place} || exit 1
    truncate -s 1M {place}/disk {image}.lost
    losetup --find {place}/disk && losetup --find {image}.lost || exit 1
    rm {image}.lost
    setsid sh -c 'sleep 600; : {token}' &
    (sh -c 'exec sleep 600; : {token}' &)
    echo litter >{place}/file
    echo ready
    sleep 600; : {token}
"""


@pytest.fixture
def litter(image, tmp_path):
    """Return the command of a run that litters, and a check that nothing is left."""
    place = tmp_path / "place"
    place.mkdir()
    token = f"{tmp_path}/litter"
    script = _LITTER.format(image=image, place=place, token=token)
    command = sandbox.command(["sh", "-c", textwrap.dedent(script)])

    def nothing_left() -> bool:
        return not (
            _processes_with(token)
            or loop_devices_over(image)
            or loop_devices_over(image.with_name("image.lost"))
            or str(place) in Path("/proc/self/mountinfo").read_text()
        )

    return command, nothing_left


@pytest.mark.parametrize("kill", [os.kill, os.killpg])
def test_kill_9_of_the_outer_process_leaves_nothing(litter, kill):
    command, nothing_left = litter
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        assert not nothing_left()
        kill(process.pid, signal.SIGKILL)
    _wait_for(nothing_left, "clean machine after kill -9")


def test_an_end_in_order_leaves_no_loop_device_either(litter):
    command, nothing_left = litter
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(_WAIT)
        # at once, without waiting: who began the run takes its files away
        assert nothing_left()


def test_loop_devices_of_others_stay(tmp_path):
    file = tmp_path / "file"
    with file.open("wb") as opened:
        opened.truncate(1 << 20)
    device = _run(["losetup", "--find", "--show", file]).stdout.strip()
    try:
        assert _run(sandbox.command(["losetup", device])).returncode == 0
        assert loop_devices_over(file) == (Path(device),)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def test_kill_9_at_any_moment_leaves_nothing(litter):
    """Twenty moments from before the namespaces exist until everything runs."""
    command, nothing_left = litter
    moments = random.Random(20)  # noqa: S311
    for _ in range(20):
        delay = moments.uniform(0, 0.25)
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(delay)
            process.kill()
        _wait_for(nothing_left, f"clean machine after kill -9 at {delay:.3f} s")


def _processes_with(token: str) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if token.encode() in (process / "cmdline").read_bytes():
                found.append(int(process.name))
    return [pid for pid in found if pid != os.getpid()]


def test_it_costs_little_time(record_property):
    """The median of a few starts, in time of the CPU: others may use it, too."""
    times = []
    for _ in range(7):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(sandbox.command(["true"]), check=True, timeout=300)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        user = after.ru_utime - before.ru_utime
        times.append(user + after.ru_stime - before.ru_stime)
    record_property("sandbox_ms", round(statistics.median(times) * 1000))
    sys.stdout.write(f"a sandbox costs {statistics.median(times) * 1000:.0f} ms\n")
    assert statistics.median(times) < 0.25
