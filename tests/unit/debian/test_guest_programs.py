"""What guests of Debian offer to others: files sent, files opened, commands run."""

import errno
import os
import shlex
import socket
import stat
import struct
import subprocess

import guest_scripts
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qubes_itests.guest.image.debian.image import LINKS

HEADER = struct.Struct("<IIQIIII")
FILE, DIRECTORY, LINK = stat.S_IFREG | 0o644, stat.S_IFDIR | 0o755, stat.S_IFLNK
END = HEADER.pack(*(0,) * 7)


def entry(name, mode=FILE, data=b"", *, size=None):
    raw = name + b"\0"
    length = len(data) if size is None else size
    return HEADER.pack(len(raw), mode, length, 1, 0, 1, 0) + raw + data


def receive(home, stream, *options):
    """Give a stream to the receiver; return its verdict, an errno."""
    environment = {"HOME": str(home), "QREXEC_REMOTE_DOMAIN": "sender"}
    receiver = "usr/lib/qubes/qfile-unpacker"
    done = guest_scripts.run(receiver, options, stream, environment)
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
    _, said = sender.communicate(timeout=300)
    assert (sender.returncode, said, receiver.wait(300)) == (0, b"", 0)
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


PLAIN = ["a b!", "Käse", "план", "日本語", "ｶﾅ한", "1€", "«a»"]
#: Pictures, marks, other scripts, spaces, what is not shown, and what turns text round.
ODD = ["test-\U0001f605", "e\u0301", "שלום", "a\u00a0b", "a\tb", "a\x1b[m", "a\u202eb"]


@pytest.mark.parametrize("name", [*PLAIN, *ODD, b"\xff"])
def test_names_that_look_like_others_are_taken_only_if_all_are(tmp_path, name):
    raw = name if isinstance(name, bytes) else name.encode()
    plain = name in PLAIN
    receiver = "usr/lib/qubes/qfile-unpacker"
    checked = guest_scripts.run(receiver, ("--check",), b"a\0" + raw + b"\0", {})
    assert checked.returncode == (0 if plain else 2)
    link = entry(b"d", DIRECTORY) + entry(b"d/l", LINK, raw) + END
    refused = 0 if plain else errno.EILSEQ
    assert receive(tmp_path, entry(raw) + END) == refused
    assert receive(tmp_path, link) == refused
    home = tmp_path / "other"
    assert receive(home, entry(raw) + END, "--allow-all-names") == 0
    (got,) = (home / "QubesIncoming/sender").iterdir()
    assert os.fsencode(got.name) == raw


@pytest.mark.parametrize(
    ("name", "target"),
    [
        (b"d/l", b"../x"),
        (b"d/l", b"/etc"),
        (b"d/l", b""),
        (b"d/l", b"./.."),
        (b"d/l", b"a/../../b"),
        # a may itself be a link to another depth
        (b"d/e/f/l", b"a/../x"),
        (b"l", b"x"),
    ],
)
def test_a_link_that_leads_out_is_refused(tmp_path, name, target):
    places = [
        entry(b"d", DIRECTORY),
        entry(b"d/e", DIRECTORY),
        entry(b"d/e/f", DIRECTORY),
    ]
    stream = b"".join(places) + entry(name, LINK, target) + END
    assert receive(tmp_path, stream) == errno.EPERM


@pytest.mark.parametrize("target", [b"./f", b"s//f", b"s/", b".", b"../f", b"./../f/."])
def test_a_link_within_what_is_sent_arrives_as_it_is(tmp_path, target):
    stream = entry(b"d", DIRECTORY) + entry(b"d/e", DIRECTORY)
    assert receive(tmp_path, stream + entry(b"d/e/l", LINK, target) + END) == 0
    link = tmp_path / "QubesIncoming/sender/d/e/l"
    # not as a path, which would be made shorter
    assert os.readlink(os.fsencode(link)) == target  # noqa: PTH115


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


@pytest.mark.parametrize("kind", [stat.S_IFREG, stat.S_IFDIR])
def test_nothing_gets_a_set_user_bit(tmp_path, kind):
    sent = entry(b"f", kind | 0o7755)
    assert receive(tmp_path, sent + (sent if kind == stat.S_IFDIR else b"") + END) == 0
    mode = (tmp_path / "QubesIncoming/sender/f").stat().st_mode
    assert stat.S_IMODE(mode) == 0o755


def test_a_directory_is_complete_when_it_comes_again(tmp_path):
    """Until then it can be written; then it has its mode and its times."""
    directory = stat.S_IFDIR | 0o555
    stream = entry(b"d", directory) + entry(b"d/f", FILE, b"x") + entry(b"d", directory)
    assert receive(tmp_path, stream + END) == 0
    status = (tmp_path / "QubesIncoming/sender/d").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_mtime) == (0o555, 1)


def test_a_directory_that_is_there_gets_more(tmp_path):
    (tmp_path / "QubesIncoming/sender/d").mkdir(parents=True)
    (tmp_path / "QubesIncoming/sender/d/old").touch()
    (tmp_path / "QubesIncoming/sender/elsewhere").symlink_to(tmp_path)
    stream = entry(b"d", DIRECTORY) + entry(b"d/f", FILE, b"x")
    assert receive(tmp_path, stream + END) == 0
    assert tree(tmp_path / "QubesIncoming/sender/d") == ["f", "old"]
    assert receive(tmp_path, entry(b"elsewhere", DIRECTORY) + END) == errno.ENOTDIR


@pytest.mark.parametrize(
    ("time", "sent"), [(-86_400, 0), (2**32 + 5, 2**32 - 1), (1.5, 1.5)]
)
def test_times_that_no_header_can_say_become_the_nearest(tmp_path, time, sent):
    path = tmp_path / "f"
    path.touch()
    os.utime(path, ns=(0, int(time * 10**9)))
    done = guest_scripts.run("usr/lib/qubes/qfile-agent", ["--", str(path)])
    assert b"Traceback" not in done.stderr
    *_, seconds, nanoseconds = HEADER.unpack_from(done.stdout)
    assert seconds + nanoseconds / 10**9 == sent


def test_links_are_left_out_when_they_are_to_be_ignored(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d/link").symlink_to("x")
    words = ["--ignore-symlinks", "--", str(tmp_path / "d")]
    done = guest_scripts.run("usr/lib/qubes/qfile-agent", words)
    assert b"link" not in done.stdout
    assert b"link, left out" in done.stderr


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


@settings(max_examples=30)  # each starts an interpreter
@given(WORDS)
def test_any_words_arrive(words):
    line = encoded([b"printf", rb"%s\0", *words])
    done = guest_scripts.run("etc/qubes-rpc/qubes.VMExec", [line])
    assert done.stdout.split(b"\0") == [*words, b""]


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
            timeout=300,
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


def test_a_view_of_a_file_leaves_it_whatever_comes(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("old")
    words = ["--view-only", "--", str(path)]
    done = guest_scripts.run("usr/lib/qubes/qopen-in-vm", words, b"new")
    assert done.stdout == b"view-only-notes.txt".ljust(256, b"\0") + b"old"
    assert path.read_text() == "old"
    assert tree(tmp_path) == ["notes.txt"]


@pytest.fixture
def program(tmp_path):
    """Return how to run a program of guests in a directory that has a file ``f``.

    It calls a recorder; what that was called with, NULs between words, is its output.
    """
    (tmp_path / "f").touch()
    binaries = tmp_path / "bin"
    binaries.mkdir()
    recorder = binaries / "qrexec-client-vm"
    recorder.write_text('#!/bin/bash\nprintf "%s\\0" "$@"\n')
    recorder.chmod(0o755)

    def run(name, arguments):
        file = LINKS.get(f"usr/bin/{name}", name)
        (binaries / name).write_text(
            (guest_scripts.ROOT / "usr/bin" / file).read_text()
        )
        (binaries / name).chmod(0o755)
        return subprocess.run(
            [binaries / name, *arguments],
            cwd=tmp_path,
            env={"PATH": f"{binaries}:{os.environ['PATH']}"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=300,
            check=False,
        )

    return run


@pytest.mark.parametrize(
    ("name", "arguments", "call"),
    [
        ("qvm-copy-to-vm", "vault f", "vault qubes.Filecopy {}/qfile-agent -- f"),
        ("qvm-copy-to-vm", "vault -v", "vault qubes.Filecopy {}/qfile-agent -- -v"),
        ("qvm-copy", "f", "@default qubes.Filecopy {}/qfile-agent -- f"),
        (
            "qvm-copy",
            "--without-progress --ignore-symlinks -- f g",
            "@default qubes.Filecopy {}/qfile-agent --ignore-symlinks -- f g",
        ),
        ("qvm-open-in-vm", "v f", "v qubes.OpenInVM {}/qopen-in-vm -- f"),
        (
            "qvm-open-in-vm",
            "--view-only v f",
            "v qubes.OpenInVM {}/qopen-in-vm --view-only -- f",
        ),
        (
            "qvm-open-in-vm",
            "v --view-only f",
            "v qubes.OpenInVM {}/qopen-in-vm --view-only -- f",
        ),
        ("qvm-open-in-dvm", "-- f", "@dispvm qubes.OpenInVM {}/qopen-in-vm -- f"),
        ("qvm-run-vm", "v a 'b c'", "v qubes.VMShell {}/qrun-in-vm 'a b c'"),
        ("qvm-run-vm", "-t v ls -t", "v qubes.VMShell {}/qrun-in-vm 'ls -t'"),
        (
            "qvm-run-vm",
            "--dispvm a",
            "@dispvm qubes.VMShell+WaitForSession {}/qrun-in-vm a",
        ),
        ("qvm-run-vm", "--no-gui -d a", "@dispvm qubes.VMShell {}/qrun-in-vm a"),
        ("qvm-run-vm", "-t --dispvm=b a", "@dispvm:b qubes.VMShell {}/qrun-in-vm a"),
        ("qvm-run-vm", "--service v test.S+1", "v test.S+1"),
    ],
)
def test_programs_of_guests_are_calls_of_services(program, name, arguments, call):
    done = program(name, shlex.split(arguments))
    words = done.stdout.decode().split("\0")[:-1]
    assert words == ["--", *shlex.split(call.format("/usr/lib/qubes"))]


def test_a_name_that_looks_like_another_is_sent_to_who_takes_all(program, tmp_path):
    (tmp_path / "in/deep").mkdir(parents=True)
    (tmp_path / "in/deep/\U0001f605").touch()
    (tmp_path / "\U0001f605").mkdir()
    (tmp_path / "\U0001f605/f").touch()
    for path, service in (
        ("in", "qubes.Filecopy+allow-all-names"),
        # what it is in is not sent
        ("\U0001f605/f", "qubes.Filecopy"),
    ):
        for name in (path, tmp_path / path):
            words = program("qvm-copy", [name]).stdout.decode().split("\0")
            assert words[:3] == ["--", "@default", service]


@pytest.mark.parametrize(
    ("options", "service"),
    [
        ([], "qubes.Filecopy+allow-all-names"),
        (["--ignore-symlinks"], "qubes.Filecopy"),
    ],
)
def test_a_link_is_sent_to_who_takes_where_it_leads(
    program, tmp_path, options, service
):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/plain").symlink_to("\U0001f605")
    words = program("qvm-copy", [*options, "in"]).stdout.decode().split("\0")
    assert words[:3] == ["--", "@default", service]


@pytest.mark.parametrize("name", ["qvm-move", "qvm-move-to-vm"])
def test_what_was_moved_is_gone(program, tmp_path, name):
    program(name, ["v", "f"] if name.endswith("vm") else ["f"])
    assert not (tmp_path / "f").exists()
    assert (tmp_path / "bin").is_dir()


def test_a_url_is_sent_to_who_opens_it(program):
    done = program("qvm-open-in-vm", ["v", "https://example.org/?a=b c"])
    words = done.stdout.decode().split("\0")[:-1]
    assert words[:3] == ["--", "v", "qubes.OpenURL"]
    script = subprocess.run(words[3:], input=b"", capture_output=True, check=True)
    assert script.stdout == b"https://example.org/?a=b c\n"


@pytest.mark.parametrize("url", ["file:///etc/passwd", "javascript:x", "", "-http://x"])
def test_a_url_that_is_none_of_the_network_is_refused(url):
    done = guest_scripts.run("etc/qubes-rpc/qubes.OpenURL", (), url.encode() + b"\n")
    assert done.returncode == 1
    assert b"expected a URL" in done.stderr


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("qvm-copy-to-vm", ["v"]),
        ("qvm-copy", []),
        ("qvm-copy", ["-v"]),
        ("qvm-open-in-dvm", []),
        ("qvm-open-in-vm", ["v"]),
        ("qvm-open-in-vm", ["v", "f", "f"]),
        ("qvm-open-in-vm", ["v", "no-such-file"]),
        ("qvm-run-vm", ["v"]),
        ("qvm-run-vm", ["--nonsense", "v", "a"]),
    ],
)
def test_a_program_without_its_arguments_explains_itself(program, name, arguments):
    done = program(name, arguments)
    assert done.returncode == 1
    assert f"usage: {name} ".encode() in done.stderr


COMMANDS = {
    "echo one; exit 3": (b"one\n", 3),
    "cat # take it all": (b"data\n", 0),
    "echo two &": (b"two\n", 0),
    "echo x;": (b"x\n", 0),
    "cat <<E\nit's\nE": (b"it's\n", 0),
    "echo 1\necho 2": (b"1\n2\n", 0),
    "read x\necho got $x": (b"got data\n", 0),
    "echo 1 \\": (b"1\n", 0),
    "(echo": (b"", 2),
    "printf '%s|' 'a b' \"c\"": (b"a b|c|", 0),
}


@pytest.mark.parametrize("text", COMMANDS)
def test_a_command_is_what_a_shell_is_given_and_its_input_is_input(text):
    """The two ends are joined by sockets, as in two VMs."""
    to_shell, from_shell = socket.socketpair(), socket.socketpair()
    data, output = os.pipe(), os.pipe()
    remote = subprocess.Popen(
        guest_scripts.command("etc/qubes-rpc/qubes.VMShell"),
        stdin=to_shell[1],
        stdout=from_shell[1],
        stderr=subprocess.DEVNULL,
    )
    saved = {"SAVED_FD_0": str(data[0]), "SAVED_FD_1": str(output[1])}
    local = subprocess.Popen(
        guest_scripts.command("usr/lib/qubes/qrun-in-vm", text),
        stdin=from_shell[0],
        stdout=to_shell[0],
        pass_fds=[data[0], output[1]],
        env=os.environ | saved,
    )
    for end in (*to_shell, *from_shell):
        end.close()
    os.write(data[1], b"data\n")
    for descriptor in (*data, output[1]):
        os.close(descriptor)
    got = b"".join(iter(lambda: os.read(output[0], 1000), b""))
    os.close(output[0])
    local.wait(300)
    assert (got, remote.wait(300)) == COMMANDS[text]


def test_an_application_is_started_by_its_name(tmp_path):
    directory = tmp_path / "applications/sub"
    directory.mkdir(parents=True)
    (directory / "app.desktop").write_text(
        "[Desktop Entry]\nExec=printf '%%s|' 'a b' %U 100%% \n"
        "[Desktop Action x]\nExec=false\n"
    )
    environment = {"XDG_DATA_DIRS": str(tmp_path), "HOME": str(tmp_path / "none")}
    service = "etc/qubes-rpc/qubes.StartApp"
    done = guest_scripts.run(service, ["sub-app"], b"", environment)
    assert done.stdout == b"a b|100%|"
    for words in ([], ["app"]):
        done = guest_scripts.run(service, words, b"", environment)
        assert done.returncode == 1
        assert done.stderr.startswith(b"qubes.StartApp: ")


@pytest.mark.parametrize("persistence", ["full", "none"])
def test_applications_are_listed_as_menus_want_them(tmp_path, persistence):
    directory = tmp_path / "applications/sub"
    directory.mkdir(parents=True)
    (directory / "app.desktop").write_text(
        "# x=y\n[Desktop Entry]\nName=An app\nExec = app %U\n"
        "[Desktop Action x]\nName=x\n"
    )
    (directory / "hidden.desktop").write_text(
        "[Desktop Entry]\nName=x\nNoDisplay = true\n"
    )
    read = tmp_path / "qubesdb-read"
    read.write_text(f"#!/bin/sh\necho {persistence}\n")
    read.chmod(0o755)
    service = tmp_path / "service"
    text = (guest_scripts.ROOT / "etc/qubes-rpc/qubes.GetAppmenus").read_text()
    service.write_text(text.replace('"/rw"', '"/"'))
    done = subprocess.run(
        ["python3", "-I", service],
        env={
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "XDG_DATA_DIRS": str(tmp_path),
            "HOME": str(tmp_path / "none"),
        },
        capture_output=True,
        check=True,
    )
    shown = (
        "sub-app.desktop:Name=An app\n"
        "sub-app.desktop:Exec=qubes-desktop-run sub-app.desktop\n\n"
    )
    assert done.stdout.decode() == (shown if persistence == "full" else "")


def ask_for_features(directory, *words):
    """Run the program, and return its status and the commands that it has run."""
    for name in ("qubesdb-write", "qrexec-client-vm"):
        program = directory / name
        program.write_text(f'#!/bin/sh\necho "{name} $*" >> {directory}/log\n')
        program.chmod(0o755)
    (directory / "log").touch()
    path = {"PATH": f"{directory}:{os.environ['PATH']}"}
    done = guest_scripts.run("usr/bin/qvm-features-request", words, b"", path)
    return done.returncode, (directory / "log").read_text().splitlines()


def test_features_are_noted_and_asked_for_when_that_is_said(tmp_path):
    noted = ["qubesdb-write -- /features-request/a.b x=y z"]
    assert ask_for_features(tmp_path, "a.b=x=y z") == (0, noted)
    noted += ["qubesdb-write -- /features-request/c "]
    noted += ["qrexec-client-vm dom0 qubes.FeaturesRequest"]
    assert ask_for_features(tmp_path, "--commit", "c=") == (0, noted)


@pytest.mark.parametrize(
    ("words", "status", "commands"),
    [
        (["a=1", "b"], 2, 0),
        (["a=1", "=b"], 2, 0),
        (["a=1", "--none"], 2, 0),
        (["--help"], 0, 0),
        (["n" * 50 + "=1", "a=1", "--commit"], 1, 2),
    ],
)
def test_what_cannot_be_asked_for_is_told(tmp_path, words, status, commands):
    """What is misused does nothing; a name that is too long is left out."""
    done, log = ask_for_features(tmp_path, *words)
    assert (done, len(log)) == (status, commands)
