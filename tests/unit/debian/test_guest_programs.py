"""What guests of Debian offer to others: files sent, files opened, commands run."""

import errno
import os
import shlex
import stat
import struct
import subprocess

import guest_scripts
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

HEADER = struct.Struct("<IIQIIII")
FILE, DIRECTORY, LINK = stat.S_IFREG | 0o644, stat.S_IFDIR | 0o755, stat.S_IFLNK
END = HEADER.pack(*(0,) * 7)


def entry(name, mode=FILE, data=b"", *, size=None):
    raw = name + b"\0"
    length = len(data) if size is None else size
    return HEADER.pack(len(raw), mode, length, 1, 0, 1, 0) + raw + data


def receive(home, stream):
    """Give a stream to the receiver; return its verdict, an errno."""
    environment = {"HOME": str(home), "QREXEC_REMOTE_DOMAIN": "sender"}
    done = guest_scripts.run("usr/lib/qubes/qfile-unpacker", (), stream, environment)
    (verdict,) = struct.unpack_from("<I", done.stdout)
    assert done.returncode == (1 if verdict else 0), done.stderr
    return verdict


def tree(directory):
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*"))


def test_files_arrive_as_they_were_sent(tmp_path):
    """Sender and receiver speak to each other over a socket, as in two VMs."""
    sent = tmp_path / "sent"
    (sent / "deep/er").mkdir(parents=True)
    (sent / "deep/er/file").write_bytes(os.urandom(300_000))
    (sent / "deep/script").write_text("#!/bin/sh\n")
    (sent / "deep/script").chmod(0o755)
    (sent / "link").symlink_to("deep/script")
    (sent / "empty").touch()
    os.utime(sent / "empty", (5, 6))
    home = tmp_path / "home"
    home.mkdir()
    receiver = subprocess.Popen(
        guest_scripts.command("usr/lib/qubes/qfile-unpacker"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "HOME": str(home), "QREXEC_REMOTE_DOMAIN": "work"},
    )
    sender = subprocess.Popen(
        guest_scripts.command("usr/lib/qubes/qfile-agent", str(sent)),
        stdin=receiver.stdout,
        stdout=receiver.stdin,
        stderr=subprocess.PIPE,
    )
    receiver.stdin.close()
    receiver.stdout.close()
    _, said = sender.communicate(timeout=60)
    assert (sender.returncode, said, receiver.wait(60)) == (0, b"", 0)
    got = home / "QubesIncoming/work/sent"
    assert tree(got) == tree(sent)
    for name in ("deep/er/file", "deep/script", "empty"):
        assert (got / name).read_bytes() == (sent / name).read_bytes()
    assert (got / "deep/script").stat().st_mode & 0o777 == 0o755
    assert (got / "link").readlink() == (sent / "link").readlink()
    assert (got / "empty").stat().st_mtime == 6


@pytest.mark.parametrize(
    "name",
    [b"../x", b"/x", b"a/../x", b".", b"..", b"", b"a//b", b"./a", b"a\0b", b"\xff"],
)
def test_a_name_that_leads_elsewhere_is_refused(tmp_path, name):
    assert receive(tmp_path, entry(name) + END) in (errno.EINVAL, errno.EILSEQ)
    assert tree(tmp_path) == ["QubesIncoming", "QubesIncoming/sender"]


@pytest.mark.parametrize("target", [b"../x", b"/etc", b"a/../../b", b"", b"./x"])
def test_a_link_that_leads_out_is_refused(tmp_path, target):
    assert receive(tmp_path, entry(b"l", LINK, target) + END) == errno.EPERM


def test_nothing_is_written_through_a_link(tmp_path):
    stream = (
        entry(b"d", DIRECTORY)
        + entry(b"d/l", LINK, b"d2")
        + entry(b"d/l/file", FILE, b"x")
    )
    assert receive(tmp_path, stream + END) == errno.ENOENT


def test_a_file_that_is_there_stays_as_it_is(tmp_path):
    assert receive(tmp_path, entry(b"f", FILE, b"old") + END) == 0
    assert receive(tmp_path, entry(b"f", FILE, b"new") + END) == errno.EEXIST
    assert (tmp_path / "QubesIncoming/sender/f").read_bytes() == b"old"


@pytest.mark.parametrize(
    "stream",
    [b"", END[:-1], entry(b"f", FILE, b"abc", size=99), entry(b"f")],
)
def test_a_stream_that_ends_early_is_told(tmp_path, stream):
    assert receive(tmp_path, stream) == errno.EPIPE


@pytest.mark.parametrize("mode", [stat.S_IFIFO, stat.S_IFCHR, stat.S_IFSOCK, 0])
def test_only_files_directories_and_links_are_made(tmp_path, mode):
    assert receive(tmp_path, entry(b"f", mode | 0o644) + END) == errno.EINVAL


def test_a_file_gets_no_set_user_bit(tmp_path):
    assert receive(tmp_path, entry(b"f", stat.S_IFREG | 0o6777) + END) == 0
    mode = (tmp_path / "QubesIncoming/sender/f").stat().st_mode
    assert mode & 0o7022 == 0


@pytest.mark.parametrize("sender", ["", "../x", ".x"])
def test_a_sender_without_a_proper_name_is_refused(tmp_path, sender):
    environment = {"HOME": str(tmp_path), "QREXEC_REMOTE_DOMAIN": sender}
    done = guest_scripts.run("usr/lib/qubes/qfile-unpacker", (), END, environment)
    assert done.returncode == 1
    assert b"no sender" in done.stderr
    assert tree(tmp_path) == []


def test_the_sender_tells_what_the_other_says(tmp_path):
    (tmp_path / "f").touch()
    verdict = struct.pack("<IIQ", errno.EDQUOT, 0, 0)
    done = guest_scripts.run(
        "usr/lib/qubes/qfile-agent", [str(tmp_path / "f")], verdict
    )
    assert done.returncode == 1
    assert os.strerror(errno.EDQUOT).encode() in done.stderr


WORDS = st.lists(
    st.binary(min_size=1, max_size=12).filter(lambda word: b"\0" not in word),
    min_size=1,
    max_size=4,
)


def encoded(words):
    def one(byte):
        if (chr(byte).isalnum() and byte < 128) or byte in b"_.":
            return chr(byte)
        return "--" if byte == ord("-") else f"-{byte:02X}"

    return "+".join("".join(map(one, word)) for word in words)


def test_a_command_with_spaces_and_quotes_is_run_as_it_is():
    words = [b"printf", b"%s|", b"a b", b"it's", b"-n", b"\xff\n"]
    done = guest_scripts.run("etc/qubes-rpc/qubes.VMExec", [encoded(words)])
    assert done.stdout == b"a b|it's|-n|\xff\n|"


@settings(deadline=None, max_examples=30)  # each runs two interpreters
@given(WORDS)
def test_any_words_arrive(words):
    code = b"import os, sys; print([os.fsencode(w) for w in sys.argv[1:]])"
    line = encoded([b"python3", b"-c", code, *words])
    done = guest_scripts.run("etc/qubes-rpc/qubes.VMExec", [line])
    assert done.stdout.decode().strip() == repr(words)


def test_a_command_that_is_not_there_is_named():
    done = guest_scripts.run("etc/qubes-rpc/qubes.VMExec", ["no--such"])
    assert done.returncode == 1
    assert done.stderr.startswith(b"no-such: ")


@pytest.fixture
def opening(tmp_path):
    """Make the service call a program of the test's; return how to call it."""
    service = (guest_scripts.ROOT / "etc/qubes-rpc/qubes.OpenInVM").read_text()
    opener = tmp_path / "open-file"
    assert service.count("/usr/lib/qubes/open-file") == 1
    copy = tmp_path / "service"
    copy.write_text(service.replace("/usr/lib/qubes/open-file", str(opener)))

    def call(name, data, script):
        opener.write_text(f"#!/bin/sh\n{script}\n")
        opener.chmod(0o755)
        return subprocess.run(
            ["python3", "-I", copy],
            input=name.ljust(256, b"\0") + data,
            capture_output=True,
            timeout=60,
            check=False,
        )

    return call


def test_a_file_that_was_changed_comes_back(opening):
    done = opening(b"a b.txt", b"old\n", 'cat "$1"; basename "$1" >>"$1"')
    assert (done.returncode, done.stdout) == (0, b"old\na b.txt\n")


@pytest.mark.parametrize(
    ("name", "script"),
    [(b"f", ":"), (b"view-only-f", 'echo x >"$1"'), (b"f", 'echo x >"$1"; exit 3')],
)
def test_what_is_unchanged_or_not_wanted_does_not_come_back(opening, name, script):
    assert opening(name, b"old\n", script).stdout == b""


@pytest.mark.parametrize("name", [b"../f", b"a/b", b"", b"..", b"a\nb", b"\xff"])
def test_a_file_with_a_bad_name_is_not_opened(opening, name):
    done = opening(name, b"x", 'echo opened >"$1"')
    assert done.returncode != 0
    assert done.stdout == b""


def test_what_comes_back_replaces_the_file(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("old")
    path.chmod(0o640)
    done = guest_scripts.run("usr/lib/qubes/qopen-in-vm", [str(path)], b"new")
    assert done.stdout == b"notes.txt".ljust(256, b"\0") + b"old"
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o640


def test_an_empty_answer_leaves_the_file(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("old")
    assert guest_scripts.run("usr/lib/qubes/qopen-in-vm", [str(path)]).returncode == 0
    assert path.read_text() == "old"
    assert tree(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize(
    ("program", "arguments", "call"),
    [
        ("qvm-copy-to-vm", ["vault", "f"], "-- vault qubes.Filecopy {}/qfile-agent f"),
        ("qvm-copy", ["f"], "-- @default qubes.Filecopy {}/qfile-agent f"),
        ("qvm-open-in-vm", ["v", "f"], "-- v qubes.OpenInVM {}/qopen-in-vm f"),
        ("qvm-open-in-dvm", ["f"], "-- @dispvm qubes.OpenInVM {}/qopen-in-vm f"),
        ("qvm-run-vm", ["v", "a", "b c"], "-- v qubes.VMShell {}/qrun-in-vm 'a b c'"),
        ("qvm-run-vm", ["--dispvm", "a"], "-- @dispvm qubes.VMShell {}/qrun-in-vm a"),
        (
            "qvm-run-vm",
            ["--dispvm=b", "a"],
            "-- @dispvm:b qubes.VMShell {}/qrun-in-vm a",
        ),
        ("qvm-run-vm", ["--service", "v", "test.S+1"], "-- v test.S+1"),
    ],
)
def test_programs_of_guests_are_calls_of_services(tmp_path, program, arguments, call):
    recorder = tmp_path / "qrexec-client-vm"
    recorder.write_text('#!/bin/bash\nprintf "%s\\0" "$@"\n')
    recorder.chmod(0o755)
    for name in ("qvm-copy-to-vm", "qvm-open-in-vm"):
        path = tmp_path / name
        path.write_text((guest_scripts.ROOT / f"usr/bin/{name}").read_text())
        path.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = guest_scripts.run(f"usr/bin/{program}", arguments, b"", environment)
    words = done.stdout.decode().split("\0")[:-1]
    assert words == shlex.split(call.format("/usr/lib/qubes"))


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("qvm-copy-to-vm", ["v"]),
        ("qvm-copy", []),
        ("qvm-open-in-dvm", []),
        ("qvm-open-in-vm", ["v"]),
        ("qvm-run-vm", ["v"]),
        ("qvm-run-vm", ["--nonsense", "v", "a"]),
    ],
)
def test_a_program_without_its_arguments_explains_itself(program, arguments):
    done = guest_scripts.run(f"usr/bin/{program}", arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(f"usage: {program} ".encode())
