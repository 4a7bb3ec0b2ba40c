"""The tools of Qubes OS's client: themselves where they are installed, else recorded.

Each test has a recording in `recorded`: what the tools said to the server, and got.
``tests/record-client`` makes them anew.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from client_recording import MismatchError, Names, Recorder, Replay
from conditions import wait_until

from qubes_itests.run.client_tools import installed_tools
from qubes_itests.serve.environment import variables
from qubes_itests.serve.place import Place

RECORDED = Path(__file__).parent / "recorded"
#: Set where the tools are to be recorded: to what tells the client's version closer.
RECORD = "QUBES_ITESTS_RECORD_CLIENT"

#: The tools that need more than a server, by what that is.
ELSEWHERE = {
    "qvm-backup": "/etc/qubes, and methods for backups",
    "qvm-backup-restore": "a backup, and scrypt",
    "qvm-template": "Python's rpm, dnf, and a repository",
}


def run_tool(socket, words, data, *, by_itself=False):
    """Run a tool that is installed."""
    command = [sys.executable, "-m", "qubes_itests", "qvm", "--socket", socket, *words]
    environment = dict(os.environ)
    if by_itself:
        module = f"qubesadmin.tools.{words[0].replace('-', '_')}"
        command = [sys.executable, "-m", module, *words[1:]]
        environment |= variables(Place(socket.parent))
    return subprocess.run(
        command,
        input=data,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture
def tools(server, request, tmp_path, tmp_path_factory):
    """Return a function that runs a tool: one that is installed, or a recorded one."""
    name = re.sub(r"[^A-Za-z0-9_]+", "-", request.node.name.removeprefix("test_"))
    path = RECORDED / f"{name.strip('-')}.json"
    fixed = {"state": server.state, "server": server.socket.parent, "tmp": tmp_path}
    names = Names(fixed)
    if not installed_tools():
        replay = Replay(server, json.loads(path.read_text())["steps"], names)
        yield lambda words, data, **_: replay.run(words, data)
    elif RECORD in os.environ:
        with Recorder(server, tmp_path_factory.mktemp("r"), names) as recorder:

            def run(words, data, **how):
                done = run_tool(recorder.socket, words, data, **how)
                recorder.step(words, data, done)
                return done

            yield run
        version = importlib.metadata.version("qubesadmin")
        recorder.write(path, f"{version} {os.environ[RECORD]}".strip())
    else:
        yield lambda words, data, **how: run_tool(server.socket, words, data, **how)


@pytest.fixture
def qvm(tools):
    """Return a function that runs a tool, and what it is to end with."""

    def run(tool, *words, data="", status=0, **how):
        done = tools([tool, *map(str, words)], data, **how)
        assert "Traceback" not in done.stderr, done.stderr
        assert done.returncode == status, done.stderr
        return done.stdout if status == 0 else done.stderr

    return run


def table(text):
    """Return the lines of a table as lists of words."""
    return [line.split() for line in text.splitlines()]


def test_the_first_visit_of_the_guide(qvm, server):
    qvm("qvm-create", "--label", "red", "--template", "tiny", "first")
    for word in ("one", "two"):
        qvm("qvm-start", "first")
        qvm("qvm-run", "-p", "-u", "root", "first", f"echo {word} > /rw/note")
        qvm("qvm-shutdown", "--wait", "first")
    (revision,) = qvm("qvm-volume", "info", "first:private", "revisions").split()
    qvm("qvm-volume", "revert", "first:private")
    assert revision not in qvm("qvm-volume", "info", "first:private", "revisions")
    qvm("qvm-volume", "resize", "first:private", "3G")
    place = f"dir_path={server.state}/xfs/slow"
    qvm("qvm-pool", "add", "slow", "file-reflink", "-o", place)
    assert ["slow", "file-reflink"] in table(qvm("qvm-pool", "list"))
    qvm("qvm-clone", "-P", "slow", "first", "copy")
    volumes = table(qvm("qvm-volume", "list", "copy"))
    assert ["slow:appvms/copy/private", "copy", "private", "Yes"] in volumes
    assert qvm("qvm-run", "-p", "copy", "cat /rw/note") == "one\n"
    assert ["copy", "Running", "AppVM", "red", "tiny", "-"] in table(qvm("qvm-ls"))
    qvm("qvm-shutdown", "--wait", "copy")
    qvm("qvm-remove", "--force", "copy", "first")
    qvm("qvm-pool", "remove", "slow")
    assert qvm("qvm-ls", "--raw-list").split() == ["dom0", "tiny", "work"]


def test_a_command_has_input_output_and_a_status(qvm):
    assert qvm("qvm-run", "--pass-io", "work", "cat", data="hello\n") == "hello\n"
    assert qvm("qvm-run", "-p", "work", "--", "echo", "a  b", "$x") == "a  b $x\n"
    assert qvm("qvm-run", "-p", "work", "echo no >&2; exit 3", status=3) == "no\n"


def test_a_clone_has_the_settings_of_its_source(qvm):
    qvm("qvm-create", "--label", "blue", "--template", "tiny", "source")
    qvm("qvm-prefs", "source", "memory", "300")
    qvm("qvm-features", "source", "gui", "1")
    qvm("qvm-service", "source", "cups", "on")
    qvm("qvm-tags", "source", "add", "demo")
    qvm("qvm-firewall", "source", "add", "drop", "10.0.0.0/8", "tcp", "80-81")
    qvm("qvm-clone", "source", "clone")
    assert qvm("qvm-prefs", "clone", "memory") == "300\n"
    assert table(qvm("qvm-features", "clone")) == [["gui", "1"], ["service.cups", "1"]]
    assert table(qvm("qvm-service", "clone")) == [["cups", "on"]]
    assert qvm("qvm-tags", "clone").split() == ["created-by-dom0", "demo"]
    assert qvm("qvm-firewall", "--raw", "clone").splitlines() == [
        "action=accept",
        "action=drop proto=tcp dst4=10.0.0.0/8 dstports=80-81",
    ]
    qvm("qvm-remove", "--force", "source", "clone")


def test_a_disposable_vm_is_gone_after_its_command(qvm):
    words = ("--class", "DispVM", "--label", "red", "nowhere")
    assert "default_dispvm of the app is None" in qvm("qvm-create", *words, status=1)
    qvm("qvm-create", "--label", "red", "--template", "tiny", "dvm")
    qvm("qvm-prefs", "dvm", "template_for_dispvms", "True")
    assert qvm("qvm-run", "-p", "--dispvm=dvm", "hostname").startswith("disp")
    qvm("qvm-remove", "--force", "dvm")


def test_a_block_device_comes_and_goes(qvm, server, tmp_path):
    image = tmp_path / "image"
    image.write_bytes(b"data".ljust(1 << 20, b"\0"))
    link = server.state / "block" / "data"
    link.symlink_to(image)
    qvm("qvm-block", "attach", "--ro", "work", "dom0:data")
    assert "work (attached: " in qvm("qvm-block", "list")
    read = ("-d", "work", "root:head -c 4 /dev/xvdi")
    wait_until(lambda: server.run(*read).stdout == b"data", "the disk in the guest")
    qvm("qvm-block", "detach", "work", "dom0:data")
    qvm("qvm-block", "assign", "work", "dom0:data")
    assert "*work (auto-attach)" in qvm("qvm-block", "list", "--assignments")
    qvm("qvm-block", "unassign", "work", "dom0:data")
    assert "work" not in qvm("qvm-block", "list", "--assignments")
    link.unlink()


def test_services_and_commands_in_all_ways(qvm):
    assert qvm("qvm-run", "-p", "-u", "root", "work", "id -un") == "root\n"
    shell = ("-p", "--service", "work", "qubes.VMShell")
    assert qvm("qvm-run", *shell, data="echo shell; exit\n") == "shell\n"
    assert qvm("qvm-run", "--service", "work", "qubes.VMShell") == ""
    assert qvm("qvm-run", "-q", "--no-gui", "work", "echo unseen") == ""
    colour = ("-p", "--filter-escape-chars", "--no-color-output")
    assert qvm("qvm-run", *colour, "work", "printf '\\033c\\n'") == "_c\n"
    local = ("-p", "--localcmd", "read line; echo local; cat")
    assert qvm("qvm-run", *local, "work", "echo to; read w; test $w = local") == ""
    assert "no.Such" in qvm("qvm-run", "-p", "--service", "work", "no.Such", status=127)
    assert "command failed" in qvm("qvm-run", "work", "exit 4", status=4)
    assert qvm("qvm-run", "--all", "-q", "true") == ""


def test_dom0_is_the_machine_of_the_caller(qvm):
    assert qvm("qvm-run", "-p", "dom0", "echo here; cat", data="in") == "here\nin"
    shell = ("-p", "--service", "dom0", "qubes.VMShell")
    assert qvm("qvm-run", *shell, data="exit 3\n", status=3) == ""
    assert "no service" in qvm("qvm-run", "-p", "--service", "dom0", "a.B", status=127)
    assert "already running" in qvm("qvm-start", "dom0", status=1)


def test_a_file_of_the_machine_is_a_disk_from_the_start_on(qvm, server, tmp_path):
    qvm("qvm-create", "--label", "red", "--template", "tiny", "drive")
    image = tmp_path / "image"
    image.write_bytes(b"data".ljust(1 << 20, b"\0"))
    words = ("qvm-run", "-p", "-u", "root", "drive")
    for option, ending in (("--cdrom", "1\n"), ("--hddisk", "0\n")):
        qvm("qvm-start", f"{option}=dom0:{image}", "drive")
        read = "head -c 4 /dev/xvdi; cat /sys/class/block/$(basename"
        read += " $(readlink -f /dev/xvdi))/ro"
        assert qvm(*words, read) == f"data{ending}"
        assert "xvdi" in qvm("qvm-block", "list")
        qvm("qvm-kill", "drive")
        assert "drive" not in qvm("qvm-block", "list", "--assignments")
    assert "Failed to setup" in qvm("qvm-start", "--cdrom=dom0:/no", "drive", status=1)
    qvm("qvm-remove", "--force", "drive")
    for link in (server.state / "block").iterdir():
        link.unlink()


def test_a_volume_shrinks_when_it_is_forced(qvm):
    qvm("qvm-create", "--label", "red", "--template", "tiny", "small")
    volume = "small:private"
    assert "Refusing" in qvm("qvm-volume", "resize", volume, "1G", status=1)
    qvm("qvm-volume", "resize", "--force", volume, "1G")
    assert qvm("qvm-volume", "info", volume, "size") == "1000000000\n"
    qvm("qvm-volume", "import", volume, "-", "--size", "4", data="four")
    qvm("qvm-volume", "config", volume, "revisions_to_keep", "3")
    qvm("qvm-volume", "clear", "--force", volume)
    qvm("qvm-volume", "clone", "--force", "work:private", volume)
    assert qvm("qvm-volume", "info", volume, "size") == "2147483648\n"
    qvm("qvm-remove", "--force", "small")


def test_a_named_disposable_vm_is_cloned(qvm):
    qvm("qvm-create", "--label", "red", "--template", "tiny", "mould")
    qvm("qvm-prefs", "mould", "template_for_dispvms", "True")
    words = ("--class", "DispVM", "--label", "red", "--template", "mould")
    qvm("qvm-create", *words, "one")
    qvm("qvm-clone", "one", "two")
    assert qvm("qvm-prefs", "two", "template") == "mould\n"
    qvm("qvm-remove", "--force", "one", "two", "mould")


def test_a_template_of_a_package(qvm, tmp_path):
    (tmp_path / "root.img").write_bytes(b"root".ljust(1024, b"\0"))
    (tmp_path / "template.conf").write_text("virt-mode=hvm\nqrexec=1\n")
    for name in ("", "vm-", "netvm-"):
        (tmp_path / f"{name}whitelisted-appmenus.list").write_text("a.desktop\n")
    words = ("--really", "--keep-source", "--skip-start")
    tool = "qvm-template-postprocess"
    qvm(tool, *words, "post-install", "packed", tmp_path)
    assert qvm("qvm-prefs", "packed", "installed_by_rpm") == "True\n"
    assert qvm("qvm-prefs", "packed", "virt_mode") == "hvm\n"
    assert qvm("qvm-features", "packed", "menu-items") == "a.desktop\n"
    assert qvm("qvm-volume", "info", "packed:root", "size") == "1024\n"
    qvm(tool, "--really", "pre-remove", "packed", tmp_path)
    assert "packed" not in qvm("qvm-ls", "--raw-list").split()


def test_an_hvm_without_a_kernel_boots_its_disk(qvm, tmp_path):
    """What is in it that could be booted is none of the tools' business."""
    (tmp_path / "disk").write_bytes(b"\xf4\xeb\xfd".ljust(510, b"\0") + b"\x55\xaa")
    qvm("qvm-create", "--class", "StandaloneVM", "--label", "red", "alone")
    qvm("qvm-prefs", "alone", "kernel", "")
    assert "virt_mode to hvm" in qvm("qvm-start", "alone", status=1)
    qvm("qvm-prefs", "alone", "virt_mode", "hvm")
    qvm("qvm-volume", "import", "alone:root", tmp_path / "disk")
    qvm("qvm-start", "alone")
    assert "has no agent" in qvm("qvm-run", "-p", "alone", "id", status=255)
    qvm("qvm-kill", "alone")
    qvm("qvm-remove", "--force", "alone")


def test_states_and_notes(qvm):
    qvm("qvm-create", "--label", "red", "--template", "tiny", "state")
    assert "not running" in qvm("qvm-pause", "state", status=1)
    qvm("qvm-start", "state")
    qvm("qvm-pause", "state")
    qvm("qvm-check", "--paused", "state")
    qvm("qvm-unpause", "state")
    qvm("qvm-check", "-q", "--running", "state")
    qvm("qvm-check", "-q", "--paused", "state", status=1)
    qvm("qvm-kill", "state")
    qvm("qvm-notes", "state", "--set", "one")
    qvm("qvm-notes", "state", "--append", "two")
    assert qvm("qvm-notes", "state", "--print").split() == ["one", "two"]
    qvm("qvm-start-daemon", "--all")
    qvm("qvm-remove", "--force", "state")


def test_settings_of_the_app_and_of_pools(qvm):
    assert ["default_template", "-", "tiny"] in table(qvm("qubes-prefs"))
    qvm("qubes-prefs", "default_dispvm", "")
    assert qvm("qubes-prefs", "default_dispvm") == ""
    qvm("qubes-prefs", "--default", "default_dispvm")
    assert ["varlibqubes", "file-reflink"] in table(qvm("qvm-pool-legacy", "-l"))
    assert "file-reflink" in qvm("qvm-pool", "drivers")
    qvm("qvm-pool", "set", "varlibqubes", "-o", "revisions_to_keep=2")
    assert ["revisions_to_keep", "2"] in table(qvm("qvm-pool", "info", "varlibqubes"))
    qvm("qvm-pool", "set", "varlibqubes", "-o", "revisions_to_keep=1")
    said = qvm("qvm-pool", "add", "p", "file", "-o", "dir_path=/proc/p", status=1)
    assert "cannot set it up: No such file or directory: /proc/p" in said
    assert {"block", "pci"} <= set(qvm("qvm-device", "--list-device-classes").split())


def test_a_rule_that_has_expired_is_gone(qvm):
    qvm("qvm-create", "--label", "red", "--template", "tiny", "wall")
    rule = ("qvm-firewall", "wall", "add", "drop")
    qvm(*rule, "10.0.0.0/8", "expire=1000000000")
    qvm(*rule, "11.0.0.0/8", "expire=4000000000")
    rules = qvm("qvm-firewall", "--raw", "wall")
    assert "dst4=11.0.0.0/8 expire=4000000000" in rules
    assert "dst4=10.0.0.0/8" not in rules
    qvm("qvm-remove", "--force", "wall")


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("qvm-pool", "remove", "none"), 1, "there is no pool 'none'"),
        (("qvm-volume", "revert", "tiny:private", "none"), 1, "has no revision 'none'"),
        (("qvm-volume", "resize", "tiny:private", "1M"), 1, "Refusing to shrink"),
        (("qvm-volume", "import", "tiny:private", "-"), 1, "bytes"),
        (("qvm-device", "teapot", "list"), 1, "Failed to list 'teapot' devices"),
        (("qvm-prefs", "work", "none", "1"), 2, "no such property"),
        (("qvm-prefs", "work", "vcpus", "0"), 1, "a whole number above 0"),
        (("qvm-start", "work"), 1, "is already running"),
        (("qvm-remove", "--force", "tiny"), 1, "template for work"),
    ],
)
def test_what_cannot_be_is_a_line_of_the_tool(qvm, words, status, said):
    size = ("--size", "9") if "import" in words else ()
    assert said in qvm(*words, *size, data="no nine bytes", status=status)


def test_the_tools_run_by_themselves(qvm):
    """With the variables that ``serve --print-env`` prints."""
    assert "work" in qvm("qvm-ls", "--raw-list", by_itself=True).split()


def test_each_tool_is_tried_or_is_said_to_be_elsewhere():
    """A tool that the client has got since is told when it is recorded."""
    path = RECORDED / "tools.json"
    if installed_tools() and RECORD in os.environ:
        scripts = importlib.metadata.distribution("qubesadmin").entry_points
        tools = sorted({each.name for each in scripts.select(group="console_scripts")})
        path.write_text(json.dumps({"tools": tools}, indent=1) + "\n")
    steps = [
        step
        for recording in RECORDED.glob("*.json")
        for step in json.loads(recording.read_text()).get("steps", [])
    ]
    tried = {step["tool"][0] for step in steps}
    tools = set(json.loads(path.read_text())["tools"])
    assert tools - tried == ELSEWHERE.keys()


@pytest.mark.parametrize(
    ("recorded", "said"),
    [
        ({"reply": "0\0pink\n"}, "expected a line 'pink'"),
        ({"reply": "2\0QubesException\0\0no\0"}, "got '0"),
        ({"request": "admin.vm.Start+ dom0 name none\0"}, "QubesVMNotFoundError"),
        ({"request": "admin.vm.Kill+ dom0 name none\0", "reply": "0\0"}, "expected '0"),
    ],
)
def test_another_answer_than_the_recorded_one_is_told(server, recorded, said):
    call = {"request": "admin.label.List+ dom0 name dom0\0", "reply": "0\0red\n"}
    step = {"tool": ["t"], "input": "", "status": 0, "stdout": "", "stderr": ""}
    Replay(server, [step | {"calls": [call]}], Names({})).run(["t"], "")
    replay = Replay(server, [step | {"calls": [call | recorded]}], Names({}))
    with pytest.raises(MismatchError, match=said):
        replay.run(["t"], "")
